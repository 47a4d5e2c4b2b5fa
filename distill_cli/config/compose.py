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
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill_cli.config.choices import conf_dir
from distill_cli.config.credentials import credential_keys, without_credentials
from distill_cli.config.flags import conf_dirs, flag_problems, split_flags
from distill_cli.config.overrides import into_dictionaries, override_problems, sweep_keys, unknown_keys
from distill_cli.config.schema import Config
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


def compose(argv: Sequence[str], *, unread: Sequence[str] = ()) -> list[Job]:
    """The jobs that `argv` (what follows the verb) describes: one, or with -m one for each element of the sweep.

    Empty where a flag of Hydra's own (--help, --cfg, ...) was answered instead.

    Args:
        unread: dictionaries that the verb does not read: they come out empty, whatever is missing in them.

    Raises:
        ConfigError: a key, a type, a choice or an override is wrong; all problems of what was typed at once.
    """
    check_overrides(argv)
    for override in hydra_plugins(argv).values():
        raise ConfigError(f"{override}: `distill train -m` takes it, no other verb; leave it out")
    overrides, flags = split_flags(argv)
    if not {"-m", "--multirun"} & set(flags) and (several := sweep_keys(overrides)):
        what = "several values are a sweep: add -m, or quote a value with commas"
        raise ConfigError(*(f"{key}: {what}" for key in sorted(several)))
    jobs: list[Job] = []
    wrong: dict[str, None] = {}

    def collect(config: DictConfig) -> None:
        if (sweeper := HydraConfig.get().runtime.choices.get("hydra/sweeper", "basic")) != "basic":
            raise ConfigError(f"hydra/sweeper={sweeper}: a file of the config names it; type it on the command line")
        for key in unread:
            OmegaConf.update(config, key, {}, merge=False, force_add=True)
        try:
            jobs.append(composed_job(config))
        except ConfigError as error:  # of what is raised here Hydra tells in its own way
            wrong.update(dict.fromkeys(error.problems))

    run_hydra(argv, collect)
    if wrong:
        raise ConfigError(*wrong)
    return jobs


def check_overrides(argv: Sequence[str]) -> None:
    """Raises ConfigError where a flag or an override is none, all problems at once: Hydra stops at the first."""
    overrides, flags = split_flags(argv)
    problems = flag_problems(flags)
    if not {"-sc", "--shell-completion"} & set(flags):  # what follows those are no overrides
        problems += override_problems(overrides, conf_dirs=conf_dirs(flags))
    if problems:
        raise ConfigError(*problems)


def hydra_plugins(argv: Sequence[str]) -> dict[str, str]:
    """Hydra's own launcher and sweeper, where one was typed: `launcher`, `sweeper` and the override that names it."""
    found = {}
    for override in split_flags(argv)[0]:
        group, _, choice = override.lstrip("+").partition("=")
        if group in ("hydra/launcher", "hydra/sweeper") and choice != "basic":
            found[group.removeprefix("hydra/")] = override
    return found


def search_space(argv: Sequence[str]) -> dict[str, str]:
    """Each key that was given several values or a range, with those."""
    words = [override.lstrip("+").partition("=") for override in split_flags(argv)[0]]
    keys = sweep_keys(split_flags(argv)[0])
    return {key: value for key, _, value in words if key in keys}


def compose_unsearched(argv: Sequence[str]) -> DictConfig:
    """The config of a search, without what is searched."""
    searched = search_space(argv)
    plain = [override for override in split_flags(argv)[0] if override.lstrip("+").partition("=")[0] not in searched]
    plain = [override for override in plain if not override.lstrip("+").startswith("hydra")]
    ConfigStore.instance().store("base_config", Config)
    try:
        with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            told = into_dictionaries(plain)
            return hydra.compose("config", overrides=[told.get(word, word) for word in plain])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error


def run_hydra(argv: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Composes, and calls `task` with each composed config.

    Raises:
        ConfigError: a key, a type, a choice or an override is wrong.
    """
    ConfigStore.instance().store("base_config", Config)
    with tempfile.TemporaryDirectory() as sweep_dir:
        os.environ["DISTILL_SWEEP_DIR"] = sweep_dir  # Hydra writes its multirun.yaml here; our folders come later
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions
        argv_before = sys.argv
        overrides, flags = split_flags(argv)
        told = into_dictionaries(overrides)
        sys.argv = ["distill", *(told.get(word, word) for word in overrides), *flags]
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(_one_line(error)) from error
        finally:
            sys.argv = argv_before
            hear_own_warnings()


def override_config(config: Config, overrides: Sequence[str], *, unread: Sequence[str] = ()) -> Config:
    """A composed config with `key=value` on top, and with `group=choice` in place of what the group was.

    Args:
        unread: as in `compose`.

    Raises:
        ConfigError: an override that is none, or that is a sweep.
    """
    problems = override_problems(overrides, conf_dirs=[conf_dir()])
    if problems:
        raise ConfigError(*problems)
    merged = OmegaConf.structured(config)
    ConfigStore.instance().store("base_config", Config)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, line = override.key_or_group, override.input_line
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{line}: takes no sweep and no deletion here; give key=value or group=choice")
        try:
            if (conf_dir() / key).is_dir():
                with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
                    group = hydra.compose("config", overrides=[line])[key]
                OmegaConf.update(merged, key, group, merge=False)
            else:
                OmegaConf.update(merged, key, override.value(), force_add=bool(into_dictionaries([line])))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{line}: {_one_line(error)}") from error
    for key in unread:
        OmegaConf.update(merged, key, {}, merge=False)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(*(f"{key}: a value is needed" for key in missing))
    return OmegaConf.to_object(merged)


def hear_own_warnings() -> None:
    """Hydra's job_logging=disabled silences every logger that is there, ours too."""
    logging.getLogger("distill_cli").setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "distill_cli" and isinstance(logger, logging.Logger):
            logger.disabled = False


def known_losses() -> dict[str, set[str]]:
    """Each divergence that a file of conf/loss names, with the other keys that the file sets: those it reads."""
    files = [OmegaConf.load(file) for file in sorted((conf_dir() / "loss").glob("*.yaml"))]
    return {file.kl_type: {str(key) for key in file if key != "kl_type"} for file in files}


def load_config(path: Path) -> Config:
    """A run's config.yaml, as written by `save_config`.

    Raises:
        ConfigError: it is damaged, or cannot be read.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        what = error.strerror if isinstance(error, OSError) else _one_line(error)
        raise ConfigError(f"{path}: is no run's configuration ({what}); bring back the one that was written") from error


def save_config(config: Config, path: Path) -> None:
    path.write_text(config_text(config))


def config_text(config: Config) -> str:
    """What a run's config.yaml holds: everything but credentials."""
    node = OmegaConf.structured(config)
    for key in credential_keys():
        if address := OmegaConf.select(node, key):
            OmegaConf.update(node, key, without_credentials(address))
    return OmegaConf.to_yaml(node)


def flatten(node: Any, at: str = "") -> dict[str, Any]:
    """A nested config as dotted keys."""
    if not isinstance(node, dict) or not node:
        return {at: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{at}.{key}" if at else str(key))
    return flat


def composed_job(config: DictConfig) -> Job:
    """What Hydra has composed, within a task that it calls.

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
        keys = sweep_keys(split_flags(sys.argv[1:])[0]) | {str(key) for key in runtime.sweeper.get("params") or {}}
        swept = [override for override in task if override.lstrip("+").split("=", 1)[0] in keys]
    return Job(
        config=OmegaConf.to_object(config),
        choices={group: choice for group, choice in runtime.runtime.choices.items() if "/" not in group},
        overrides=[without_credentials(override.removeprefix("++")) for override in task],
        swept=[without_credentials(override.removeprefix("++")) for override in swept],
    )


def _one_line(error: Exception) -> str:
    cause = error.__cause__
    text = str(error).strip().splitlines()[0]
    if isinstance(cause, OmegaConfBaseException):
        text += ": " + str(cause).splitlines()[0]
    return text
