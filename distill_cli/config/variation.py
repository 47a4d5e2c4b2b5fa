"""A config on disk, and one config made from another. Configs are frozen: every variation comes from `override`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from distill_cli.config.choices import conf_dir
from distill_cli.config.credentials import credential_keys, without_credentials
from distill_cli.config.fields import flatten, has_property
from distill_cli.config.overrides import current_key, into_dictionaries, override_problems
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError

GLOBAL = "# @package _global_"
"""First line of a choice that sets keys anywhere (`experiment=...`, `model=...`)."""


def override(
    config: Config,
    overrides: Sequence[str] | Mapping[str, Any],
    *,
    typed: Sequence[str] = (),
    unread: Sequence[str] = (),
) -> Config:
    """Return `config` changed by `key=value` and `group=choice`, as typed after a verb; or by values by dotted key.

    As in Hydra, choices come first, in whatever order they were typed. A choice replaces its whole group.

    Args:
        typed: the overrides that the config was made with. A choice leaves the values of their keys alone, as it would
            in one command with them.
        unread: dictionaries to empty, whatever is missing in them.

    Raises:
        ConfigError: an override names no key, no choice, or a value of another type; or it is a sweep.
    """
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            config = _with_value(config, key.split("."), value)
        return config
    if problems := override_problems(overrides, conf_dirs=[conf_dir()]):
        raise ConfigError(*problems)
    merged, before = OmegaConf.structured(config), OmegaConf.structured(config)
    kept = [key for key in (text.lstrip("+").partition("=")[0] for text in typed) if not (conf_dir() / key).is_dir()]
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for one in sorted(parsed, key=lambda one: not (conf_dir() / one.key_or_group).is_dir()):
        key, line = one.key_or_group, str(one.input_line)
        if one.is_delete() or one.is_sweep_override():
            raise ConfigError(f"{line}: takes no sweep and no deletion here; give key=value or group=choice")
        try:
            if (conf_dir() / key).is_dir():
                _choose(merged, group=key, choice=str(one.value()))
                for name in kept:
                    if (value := OmegaConf.select(before, name)) is not None:
                        OmegaConf.update(merged, name, value, merge=False, force_add=True)
            else:
                OmegaConf.update(merged, key, one.value(), force_add=bool(into_dictionaries([line])))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{line}: {one_line(error)}") from error
    for key in unread:
        OmegaConf.update(merged, key, {}, merge=False)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(*(f"{key}: a value is needed" for key in missing))
    changed: Any = OmegaConf.to_object(merged)
    return changed


def _with_value(section: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    inner = _with_value(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})


def _choose(merged: DictConfig, *, group: str, choice: str) -> None:
    """Replace in `merged` what the file `group`/`choice`.yaml sets, with the values that Hydra composes for it."""
    ConfigStore.instance().store("base_config", Config)
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        composed = hydra.compose("config", overrides=[f"{group}={choice}"])
    file = conf_dir() / group / f"{choice}.yaml"
    if not file.read_text().startswith(GLOBAL):
        OmegaConf.update(merged, group, composed[group], merge=False)
        return
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    chosen = [name for entry in content.pop("defaults", []) if isinstance(entry, dict) for name in entry]
    for key in (*(name.removeprefix("override ").removeprefix("/") for name in chosen), *flatten(content)):
        try:
            value = OmegaConf.select(composed, key, throw_on_missing=True)
        except MissingMandatoryValue:
            value = MISSING
        OmegaConf.update(merged, key, value, merge=False, force_add=True)


def forbidden_changes(before: Config, after: Config, *, unless: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, old and new value of each key that differs and lacks the property `unless` (see `fields`)."""
    old, new = plain(before), plain(after)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not has_property(Config, key, unless):
            yield key, old.get(key), new.get(key)


def plain(config: Config) -> dict[str, Any]:
    """Return a config as dotted keys and plain values."""
    flat = flatten(dataclasses.asdict(config))
    return {key: value.value if isinstance(value, Enum) else value for key, value in flat.items()}


def load_config(path: Path) -> Config:
    """Read a run's config.yaml, as written by `save_config`.

    Raises:
        ConfigError: the file is damaged, or cannot be read.
    """
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ConfigError(f"{path}: cannot be read as a run's config ({reason}); restore the original file") from error
    return config


def save_config(config: Config, path: Path) -> None:
    """Write a run's config.yaml, without credentials."""
    path.write_text(config_text(config))


def config_text(config: Config) -> str:
    """Return what a run's config.yaml holds: everything but credentials."""
    addresses = {key: attrgetter(key)(config) for key in credential_keys()}
    shown = override(config, {key: without_credentials(uri) for key, uri in addresses.items() if uri})
    return OmegaConf.to_yaml(OmegaConf.structured(shown))


def one_line(error: Exception) -> str:
    """Return an error's first line, with that of an OmegaConf error that caused it."""
    cause = error.__cause__ or error.__context__
    text = str(error).strip().splitlines()[0].removesuffix(":")
    if isinstance(cause, OmegaConfBaseException):
        text += ": " + str(cause).splitlines()[0]
    now = current_key(str(getattr(cause or error, "full_key", "")))
    return text + (f"; it is now {now}" if now else "")
