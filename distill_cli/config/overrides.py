"""What was typed, held against the schema before Hydra composes: every problem at once, with the nearest known name.

Hydra alone stops at the first problem, and lets `+loss.zz=1` past a structured config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill_cli.config.choices import group_choices, groups, nearest
from distill_cli.config.schema import Config, SlurmConfig

RENAMED: dict[str, str] = {
    **{f"cluster.{field.name}": f"cluster.slurm.{field.name}" for field in dataclasses.fields(SlurmConfig)},
    "cluster.array_parallelism": "cluster.parallel_jobs",
    "train.max_bad_steps": "train.max_bad_updates",
    "train.warmup_steps": "train.warmup_updates",
}
"""Keys of earlier versions, and what they are called now."""

INSTEAD = {"hydra/launcher": "cluster=slurm", "hydra/sweeper": "search.trials=N"}
"""What to type in place of a plugin of Hydra's."""


def override_problems(overrides: Sequence[str], *, conf_dirs: Sequence[Path]) -> list[str]:
    """One line for each override that names no key, no choice, or a value of another type."""
    if not overrides:
        return []  # the schema takes a while
    schema = OmegaConf.structured(Config)
    parser = OverridesParser.create()
    problems = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            problems.append(f"{text}: not an override, which is key=value; a verb comes first, and there is one")
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{text}: not an override: {reason}; write key=value, and quote what has blanks or commas")
            continue
        problems += _problems_of(override, text, schema, conf_dirs)
    nulls = {text.removesuffix("=null") for text in overrides if text.endswith("=null")}
    for text in overrides:
        problems += [f"{text}: {key} is null; leave {key}=null out" for key in nulls if text.startswith(f"{key}.")]
    return problems


def into_dictionaries(overrides: Sequence[str]) -> dict[str, str]:
    """What was typed -> what Hydra is told: `data.train.limit=5` is `++data.train.limit=5`, `{limit: 5}` likewise.

    Of a dictionary Hydra alone would take the keys that the chosen file happens to set; which there are is for its
    reader to say.
    """
    schema = OmegaConf.structured(Config)
    keys = {text: text.split("=", 1)[0] for text in overrides if "=" in text}
    return {text: f"++{text}" for text, key in keys.items() if _is_of_dictionary(schema, key)}


def sweeps(overrides: Sequence[str]) -> list[Override]:
    """The overrides that give several values or a range."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override for override in parsed if override.is_sweep_override()]


def sweep_keys(overrides: Sequence[str]) -> set[str]:
    """The keys and groups that were given several values."""
    return {override.key_or_group for override in sweeps(overrides)}


def takes_fractions(key: str) -> bool:
    """Whether 0.5 is a value of the key's type."""
    return _type_problem(OmegaConf.structured(Config), key, 0.5) is None


def unknown_keys(node: Any, at: str = "") -> list[str]:
    """Dotted paths in a composed config that no dataclass field declares."""
    if not isinstance(node, DictConfig):
        return []
    kind = OmegaConf.get_type(node)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    found = []
    for key in node:
        path = f"{at}.{key}" if at else str(key)
        if fields is not None and key not in fields:
            found.append(path)
        elif not OmegaConf.is_missing(node, key):
            found += unknown_keys(node._get_node(key), path)
    return found


def current_key(key: str) -> str | None:
    """Return what a renamed key, or one inside it, is called now; None if it was never known."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def known_keys(kind: type = Config, at: str = "") -> Iterator[str]:
    """Every dotted key of the schema; a dictionary's own keys are its user's."""
    for field in dataclasses.fields(kind):
        path = f"{at}.{field.name}" if at else field.name
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            yield from known_keys(type(default), path)
        else:
            yield path


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
        return []  # a glob: Hydra knows what it stands for
    if key.split("@")[0] in groups(conf_dirs) and all(isinstance(value, str | None) for value in values):
        choices = group_choices(key.split("@")[0], conf_dirs)
        return [
            f"{key}={value}: no such choice{nearest(str(value), choices)} ({key} has: {', '.join(choices)})"
            for value in values
            if value not in choices and not (value is None and key == "experiment")
        ]
    if override.is_add() and key.startswith("loss.") and not _is_known(schema, key):
        return [f"{key}: unknown key; a parameter of a divergence of your own is loss.kwargs.{key[len('loss.') :]}"]
    if not _is_known(schema, key):
        if (now := current_key(key)) is not None:
            return [f"{key}: is now {now}"]
        return [f"{key or text}: unknown key{nearest(key, [*known_keys(), *groups(conf_dirs)])}"]
    return [problem for value in values if (problem := _type_problem(schema, key, value))]


def _values(override: Override) -> list[Any]:
    if override.is_interval_sweep():
        bounds = override.value().start, override.value().end
        return [int(bound) if float(bound).is_integer() else bound for bound in bounds]
    if not override.is_sweep_override() or override.is_range_sweep():
        return [] if override.is_sweep_override() else [override.value()]
    return list(override.sweep_iterator())


def _plain(value: Any) -> Any:
    """A parsed value as a plain one: what `sweep_iterator` and `value` give for quoted strings are objects."""
    text = getattr(value, "text", None)
    return text if isinstance(text, str) else value


def _is_of_dictionary(schema: DictConfig, key: str) -> bool:
    """Whether a key is a dictionary, or one of its own that no dataclass declares."""
    if not _is_known(schema, key):
        return False
    node = OmegaConf.select(schema, key)
    if isinstance(node, DictConfig):
        return not dataclasses.is_dataclass(OmegaConf.get_type(node))
    return node is None and key not in set(known_keys())


def _is_known(schema: DictConfig, key: str) -> bool:
    node: Any = schema
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        kind = OmegaConf.get_type(node)
        if not dataclasses.is_dataclass(kind):
            return True  # inside a dictionary: its reader judges
        if part not in {field.name for field in dataclasses.fields(kind)}:
            return False
        node = node._get_node(part)
    return True


def _type_problem(schema: DictConfig, key: str, value: Any) -> str | None:
    if isinstance(value, str) and "${" in value:
        return None  # an interpolation is judged where it is resolved
    try:
        OmegaConf.update(OmegaConf.create(schema), key, value, merge=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        return f"{key}={value}: {reason[0].lower()}{reason[1:]}"
    return None
