"""Check overrides and apply them to a config (`override`), and read a run's config.yaml.

Configs are frozen: every variation of one comes from `override`.

Overrides are checked against the schema before Hydra composes: every problem at once, with the nearest known name.
Hydra alone stops at the first problem, and lets `+loss.zz=1` past a structured config.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill_cli.config.choices import SEVERAL, conf_dir, group_choices, groups, nearest
from distill_cli.config.credentials import credential_keys, without_credentials
from distill_cli.config.execution_schema import SlurmConfig
from distill_cli.config.fields import declared_as, declared_keys, flatten, has_property, is_within
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, refuse

RENAMED: dict[str, str] = {
    **{f"cluster.{field.name}": f"cluster.slurm.{field.name}" for field in dataclasses.fields(SlurmConfig)},
    "cluster.array_parallelism": "cluster.parallel_jobs",
    "train.max_bad_steps": "train.max_bad_updates",
    "train.warmup_steps": "train.warmup_updates",
}
"""Keys of earlier versions, and their present names."""

INSTEAD = {"hydra/launcher": "cluster=slurm", "hydra/sweeper": "search.trials=N"}
"""What to type in place of one of Hydra's plugins."""

Overrides = Sequence[str] | Mapping[str, Any]
"""As typed, or values by dotted key."""

GLOBAL = "# @package _global_"
"""First line of a choice that sets keys anywhere (`experiment=...`, `model=...`)."""


def override(config: Config, overrides: Overrides, *, typed: Sequence[str] = (), unread: Sequence[str] = ()) -> Config:
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
    refuse(override_problems(overrides, conf_dirs=[conf_dir()]))
    merged, before = OmegaConf.structured(config), OmegaConf.structured(config)
    kept = [key for key in (text.lstrip("+").partition("=")[0] for text in typed) if not (conf_dir() / key).is_dir()]
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for one in sorted(parsed, key=lambda one: not (conf_dir() / one.key_or_group).is_dir()):
        key, line = one.key_or_group, str(one.input_line)
        if one.is_delete() or one.is_sweep_override():
            raise ConfigError(f"{line}: takes no sweep and no deletion here; give key=value or group=choice")
        try:
            if (conf_dir() / key).is_dir():
                _choose(merged, group=key, choice=one.value())
                for text in typed:  # what was chosen within the group
                    inner, _, choice = text.lstrip("+").partition("=")
                    if inner.startswith(f"{key}/"):
                        _choose(merged, group=inner, choice=None if choice == "null" else choice)
                for name in kept:
                    if (value := OmegaConf.select(before, name)) is not None:
                        OmegaConf.update(merged, name, value, merge=False, force_add=True)
            else:
                OmegaConf.update(merged, key, one.value(), force_add=bool(into_dictionaries([line])))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{line}: {one_line(error)}") from error
    for key in unread:
        OmegaConf.update(merged, key, {}, merge=False)
    refuse(map(missing_value, sorted(OmegaConf.missing_keys(merged))))
    changed: Any = OmegaConf.to_object(merged)
    return changed


def _with_value(section: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    inner = _with_value(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})


def _choose(merged: DictConfig, *, group: str, choice: Any) -> None:
    """Replace in `merged` what the file `group`/`choice`.yaml sets, with the values that Hydra composes for it.

    A group inside another sets keys of that; None, which no other has, unsets them. A list chooses several files.
    """
    section, is_inner, _ = group.partition("/")
    if is_inner:
        contents: dict[str, Any] = {
            name: OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
            for name in group_choices(group, [conf_dir()])
        }
        for key in {key for content in contents.values() for key in content}:
            OmegaConf.update(merged, f"{section}.{key}", contents.get(str(choice), {}).get(key), merge=False)
        return
    ConfigStore.instance().store("base_config", Config)
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        typed = f"[{','.join(map(str, choice))}]" if isinstance(choice, list) else choice
        composed = hydra.compose("config", overrides=[f"{group}={typed}"])
    file = conf_dir() / group / f"{choice}.yaml"
    if isinstance(choice, list) or not file.read_text().startswith(GLOBAL):
        OmegaConf.update(merged, group, composed[group], merge=False)
        return
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    chosen = [name for entry in content.pop("defaults", []) if isinstance(entry, dict) for name in entry]
    for key in (*(name.removeprefix("override ").removeprefix("/") for name in chosen), *flatten(content)):
        value = OmegaConf.select(composed, key, default=MISSING)
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


def override_problems(overrides: Sequence[str], *, conf_dirs: Sequence[Path]) -> list[str]:
    """Return one line for each override that names no key, no choice, or a value of another type."""
    if not overrides:
        return []  # building the schema takes a while
    schema, parser, problems = OmegaConf.structured(Config), OverridesParser.create(), []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            problems.append(f"{text}: not an override, which is key=value; a verb comes first, and there is one")
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{text}: not an override: {reason}; write key=value, and quote what has blanks or commas")
        else:
            problems += _problems_of(override, text, schema, conf_dirs)
    nulls = {text.removesuffix("=null") for text in overrides if text.endswith("=null")}
    for text in overrides:
        problems += [f"{text}: {key} is null; leave {key}=null out" for key in nulls if text.startswith(f"{key}.")]
    return problems


def into_dictionaries(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides of free-form dictionaries with a prefix: `data.train.limit=5` becomes `++data.train.limit=5`.

    Hydra alone takes only keys that the chosen file sets. The data source checks its own keys.
    """
    keys = {text: text.split("=", 1)[0] for text in overrides if "=" in text}
    dictionaries = [known for known, data in declared_keys(Config).items() if data["is_dictionary"]]
    return {text: f"++{text}" for text, key in keys.items() if any(is_within(key, known) for known in dictionaries)}


def sweeps(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides that give several values or a range."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override for override in parsed if override.is_sweep_override()]


def sweep_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys and groups that were given several values."""
    return {override.key_or_group for override in sweeps(overrides)}


def takes_fractions(key: str) -> bool:
    """Whether 0.5 is a value of the key's type."""
    return _type_problem(OmegaConf.structured(Config), key, 0.5) is None


def missing_value(key: str) -> str:
    """Return the line about a key that has no value and no default."""
    fixes = {
        "data.train.": "; give a file or dataset (data=prompts if it has no answers), or choose one (distill ls data)",
        "data.validation.": "; give held-out rows, or set data.validation=null",
        "model.": "; give a folder or a hub name, or choose a pair (distill ls model)",
    }
    return f"{key}: a value is needed" + next((fix for at, fix in fixes.items() if key.startswith(at)), "")


def unknown_keys(config: DictConfig) -> list[str]:
    """Return the dotted keys of a composed config that the schema does not declare."""
    return [key for key in flatten(OmegaConf.to_container(config)) if not _is_known(key)]


def current_key(key: str) -> str | None:
    """Return the present name of a renamed key, or of one inside it; None if it was never known."""
    names = (new + key.removeprefix(old) for old, new in RENAMED.items() if is_within(key, old))
    return next(names, None)


def _problems_of(override: Override, text: str, schema: DictConfig, conf_dirs: Sequence[Path]) -> list[str]:
    key = override.key_or_group
    if key in INSTEAD and override.value() != "basic":
        return [f"{text}: distill loads no plugins of Hydra's; type {INSTEAD[key]}"]
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return []
    if override.is_delete():
        return [f"{text}: keys cannot be removed; set another value"]
    try:
        values = [_plain(value) for value in _values(override)]
    except HydraException:
        return []  # a glob, which Hydra expands
    group = key.split("@")[0]
    if group in SEVERAL:
        if override.is_add():
            return [f"{text}: a choice takes no +; several are chosen by a list: {group}=[a,b]"]
        values = [_plain(one) for value in values for one in (value if isinstance(value, list) else [value])]
    if group in groups(conf_dirs) and all(isinstance(value, str | None) for value in values):
        choices = group_choices(group, conf_dirs)
        wrong, has = [one for one in values if one not in choices], f"({key} has: {', '.join(choices)})"
        return [f"{key}={one}: no such choice{nearest(str(one), choices)} {has}" for one in wrong]
    if _is_known(key):
        declared = declared_as(Config, key)
        problems = (_type_problem(schema, declared, value) for value in values)
        return [problem.replace(declared, key, 1) for problem in problems if problem]
    if override.is_add() and key.startswith("loss."):
        return [f"{key}: unknown key; a parameter of a divergence of your own is loss.kwargs.{key[len('loss.') :]}"]
    if (now := current_key(key)) is not None:
        return [f"{key}: is now {now}"]
    return [f"{key or text}: unknown key{nearest(key, [*declared_keys(Config), *groups(conf_dirs)])}"]


def _values(override: Override) -> list[Any]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        bounds = (float(bound) for bound in (value.start, value.end) if bound is not None)
        return [int(bound) if bound.is_integer() else bound for bound in bounds]
    if not override.is_sweep_override():
        return [value]
    return [] if override.is_range_sweep() else list(override.sweep_iterator())


def _plain(value: Any) -> Any:
    """Return the text of a quoted string, which `sweep_iterator` and `value` give as an object."""
    text = getattr(value, "text", None)
    return text if isinstance(text, str) else value


def _is_known(key: str) -> bool:
    """Whether a dotted key is one of the schema, one of its sections, or inside a dictionary."""
    keys, key = declared_keys(Config).items(), declared_as(Config, key)
    return any(
        is_within(known, key) or ((data["is_dictionary"] or data.get("schedule")) and is_within(key, known))
        for known, data in keys
    )


def _type_problem(schema: DictConfig, key: str, value: Any) -> str | None:
    """Set a value in `schema`, unless it is null; return a line if the key does not take it."""
    if isinstance(value, str) and "${" in value:
        return None  # an interpolation is checked when it is resolved
    try:
        target = OmegaConf.create(schema) if value is None else schema  # a copy takes ten times as long
        OmegaConf.update(target, key, value, merge=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        return f"{key}={value}: {reason[0].lower()}{reason[1:]}"
    return None
