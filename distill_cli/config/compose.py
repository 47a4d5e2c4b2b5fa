"""Compose configs with Hydra. The result is a list of jobs, each with a config that is ready to run.

`@hydra.main` keeps Hydra's own flags (-m, --cfg, --info, --help, completion). Its task function starts nothing: it
checks and collects, so that a sweep is checked as a whole before its first run.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill_cli.config import variation
from distill_cli.config.choices import SEVERAL, conf_dir
from distill_cli.config.credentials import without_credentials
from distill_cli.config.flags import conf_dirs
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, refuse


@dataclass(frozen=True)
class Job:
    """One composed config, and what is needed to name its run."""

    config: Config
    choices: dict[str, str]
    """The chosen file of each config group."""
    overrides: list[str]
    """The typed overrides, with the values of this element of a sweep."""
    swept: list[str]
    """The overrides that distinguish this element of a sweep from the others; empty for a single run."""


def compose(overrides: Sequence[str], flags: Sequence[str] = (), *, unread: Sequence[str] = ()) -> list[Job]:
    """Return the jobs that the overrides describe: one, or with `--multirun` one for each element of the sweep.

    Empty if Hydra answered one of its flags (`--cfg`, ...) instead.

    Args:
        flags: Hydra's, as `flags.add_hydra_flags` collects them.
        unread: dictionaries that the verb does not read: they are emptied, whatever is missing in them.

    Raises:
        ConfigError: a key, a type, a choice or an override is wrong; with all problems of what was typed.
    """
    check_overrides(overrides, flags)
    rule = "is a range, which `distill train -m` searches with search.trials=N; add that, or give values"
    refuse(f"{one.input_line}: {rule}" for one in variation.sweeps(overrides) if one.is_interval_sweep())
    if "--multirun" not in flags:
        refuse_sweep(overrides)
    jobs, problems = list[Job](), list[str]()

    def collect(config: DictConfig) -> None:
        for key in unread:
            OmegaConf.update(config, key, {}, merge=False, force_add=True)
        try:
            jobs.append(composed_job(config, overrides))
        except ConfigError as error:  # Hydra would print an error that leaves this function
            problems.extend(error.problems)

    run_hydra(overrides, flags, collect)
    refuse(problems)
    return jobs


def check_overrides(overrides: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Raise ConfigError if overrides are wrong, with all problems at once: Hydra stops at the first."""
    has_no_use = "--resolve" in flags and "--cfg" not in flags
    problems = ["--resolve: is for --cfg; add it, or leave this out"] if has_no_use else []
    if "--shell-completion" not in flags:  # what follows that flag are no overrides
        problems += variation.override_problems(overrides, conf_dirs=conf_dirs(flags))
    refuse(problems)


def refuse_sweep(overrides: Sequence[str]) -> None:
    """Raise ConfigError if overrides, which are right in themselves, give several values without -m."""
    rule, fix = "several values are a sweep: add -m, or", "quote a value with commas"
    several = {group: f"write a list, as in {group}=[mlflow,wandb]" for group in SEVERAL}
    refuse(f"{key}: {rule} {several.get(key, fix)}" for key in sorted(variation.sweep_keys(overrides)))


def run_hydra(overrides: Sequence[str], flags: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Compose, and call `task` with each composed config.

    Raises:
        ConfigError: a key, a type, a choice or an override is wrong.
    """
    ConfigStore.instance().store("base_config", Config)
    argv, prefixed = sys.argv, variation.into_dictionaries(overrides)
    with tempfile.TemporaryDirectory() as sweep_dir:
        os.environ["DISTILL_SWEEP_DIR"] = sweep_dir  # Hydra writes its multirun.yaml there, not in a run's folder
        os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them
        sys.argv = ["distill", *(prefixed.get(text, text) for text in overrides), *flags]  # the order Hydra parses
        try:
            with mode_of_flags(overrides):
                hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(variation.one_line(error)) from error
        finally:
            sys.argv = argv


@contextmanager
def mode_of_flags(overrides: Sequence[str]) -> Iterator[None]:
    """Let Hydra take from its flags whether it sweeps, unless an override says it.

    Symptom: it composes each config twice, the first time for nothing but hydra.mode.
    No longer needed when: `Hydra.get_mode` composes nothing.
    """
    composing = Hydra.get_mode
    if not any("hydra.mode=" in text for text in overrides):
        Hydra.get_mode = lambda self, config_name, overrides: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = composing  # type: ignore[method-assign]


def composed_job(config: DictConfig, overrides: Sequence[str]) -> Job:
    """Return the job of a config that Hydra has composed, inside the task that Hydra calls.

    Args:
        overrides: as typed; in a sweep those of all its elements.

    Raises:
        ConfigError: a key is unknown, or has no value.
    """
    problems = [f"{key}: unknown key" for key in variation.unknown_keys(config)]
    refuse([*problems, *map(variation.missing_value, sorted(OmegaConf.missing_keys(config)))])
    runtime = HydraConfig.get()
    task, swept = [without_credentials(text.removeprefix("++")) for text in runtime.overrides.task], []
    if runtime.mode is not None and runtime.mode.name == "MULTIRUN":
        keys = variation.sweep_keys(overrides) | {str(key) for key in runtime.sweeper.get("params") or {}}
        swept = [text for text in task if text.lstrip("+").split("=", 1)[0] in keys]
    choices = {group: choice for group, choice in runtime.runtime.choices.items() if not group.startswith("hydra/")}
    composed: Any = OmegaConf.to_object(config)
    return Job(config=composed, choices=choices, overrides=task, swept=swept)
