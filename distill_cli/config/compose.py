"""Hydra composes; what comes out is a list of jobs, each a config that is ready to run.

`@hydra.main` keeps Hydra's own flags (-m, --cfg, --info, --help, completion). Its task function starts nothing: it
checks and collects, so that a sweep is checked whole before its first run.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill_cli.config.choices import conf_dir
from distill_cli.config.credentials import without_credentials
from distill_cli.config.flags import conf_dirs
from distill_cli.config.overrides import into_dictionaries, override_problems, sweep_keys, sweeps, unknown_keys
from distill_cli.config.schema import Config
from distill_cli.config.variation import one_line
from distill_cli.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """One composed config, and what is needed to name its run."""

    config: Config
    choices: dict[str, str]
    """The chosen file of each config group."""
    overrides: list[str]
    """What was typed, for this element of a sweep."""
    swept: list[str]
    """The overrides that tell this element of a sweep from the others; empty for a single run."""


def compose(overrides: Sequence[str], flags: Sequence[str] = (), *, unread: Sequence[str] = ()) -> list[Job]:
    """Return the jobs that the overrides describe: one, or with `--multirun` one for each element of the sweep.

    Empty if Hydra answered one of its flags (`--cfg`, ...) instead.

    Args:
        flags: Hydra's, as `flags.add_hydra_flags` collects them.
        unread: dictionaries that the verb does not read: they come out empty, whatever is missing in them.

    Raises:
        ConfigError: a key, a type, a choice or an override is wrong; all problems of what was typed at once.
    """
    check_overrides(overrides, flags)
    if ranges := [override.input_line for override in sweeps(overrides) if override.is_interval_sweep()]:
        what = "is a range, which `distill train -m` searches with search.trials=N; add that, or give values"
        raise ConfigError(*(f"{line}: {what}" for line in ranges))
    if "--multirun" not in flags and (several := sweep_keys(overrides)):
        what = "several values are a sweep: add -m, or quote a value with commas"
        raise ConfigError(*(f"{key}: {what}" for key in sorted(several)))
    jobs: list[Job] = []
    wrong: dict[str, None] = {}

    def collect(config: DictConfig) -> None:
        for key in unread:
            OmegaConf.update(config, key, {}, merge=False, force_add=True)
        try:
            jobs.append(composed_job(config, overrides))
        except ConfigError as error:  # of what is raised here Hydra tells in its own way
            wrong.update(dict.fromkeys(error.problems))

    run_hydra(overrides, flags, collect)
    if wrong:
        raise ConfigError(*wrong)
    return jobs


def check_overrides(overrides: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Raise ConfigError if overrides are wrong, with all problems at once: Hydra stops at the first."""
    problems = []
    if "--resolve" in flags and "--cfg" not in flags:
        problems.append("--resolve: is for --cfg; add it, or leave this out")
    if "--shell-completion" not in flags:  # the words after it are no overrides
        problems += override_problems(overrides, conf_dirs=conf_dirs(flags))
    if problems:
        raise ConfigError(*problems)


def run_hydra(overrides: Sequence[str], flags: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Compose, and call `task` with each composed config.

    Raises:
        ConfigError: a key, a type, a choice or an override is wrong.
    """
    ConfigStore.instance().store("base_config", Config)
    with tempfile.TemporaryDirectory() as sweep_dir:
        os.environ["DISTILL_SWEEP_DIR"] = sweep_dir  # Hydra writes its multirun.yaml here; our folders come later
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions
        argv_before = sys.argv
        told = into_dictionaries(overrides)
        sys.argv = ["distill", *(told.get(word, word) for word in overrides), *flags]  # Hydra takes no other order
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(one_line(error)) from error
        finally:
            sys.argv = argv_before
            hear_own_warnings()


def hear_own_warnings() -> None:
    """Hydra's job_logging=disabled silences every logger that is there, ours too."""
    logging.getLogger("distill_cli").setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "distill_cli" and isinstance(logger, logging.Logger):
            logger.disabled = False


def composed_job(config: DictConfig, overrides: Sequence[str]) -> Job:
    """What Hydra has composed, within a task that it calls.

    Args:
        overrides: what was typed, of a sweep for all its elements.

    Raises:
        ConfigError: a key is unknown, or has no value.
    """
    unknown = unknown_keys(config)
    missing = sorted(OmegaConf.missing_keys(config))
    problems = [f"{key}: unknown key" for key in unknown] + [f"{key}: a value is needed" for key in missing]
    if problems:
        raise ConfigError(*problems)
    runtime = HydraConfig.get()
    task = list(runtime.overrides.task)
    swept = []
    if runtime.mode is not None and runtime.mode.name == "MULTIRUN":
        keys = sweep_keys(overrides) | {str(key) for key in runtime.sweeper.get("params") or {}}
        swept = [override for override in task if override.lstrip("+").split("=", 1)[0] in keys]
    return Job(
        config=OmegaConf.to_object(config),
        choices={group: choice for group, choice in runtime.runtime.choices.items() if "/" not in group},
        overrides=[without_credentials(override.removeprefix("++")) for override in task],
        swept=[without_credentials(override.removeprefix("++")) for override in swept],
    )
