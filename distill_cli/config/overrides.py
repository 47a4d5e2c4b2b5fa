"""Check overrides against the schema before Hydra composes: every problem at once, with the nearest known name.

Hydra alone stops at the first problem, and lets `+loss.zz=1` past a structured config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill_cli.config.choices import group_choices, groups, nearest
from distill_cli.config.execution_schema import SlurmConfig
from distill_cli.config.fields import declared_keys, flatten, is_within
from distill_cli.config.schema import Config

RENAMED: dict[str, str] = {
    **{f"cluster.{field.name}": f"cluster.slurm.{field.name}" for field in dataclasses.fields(SlurmConfig)},
    "cluster.array_parallelism": "cluster.parallel_jobs",
    "train.max_bad_steps": "train.max_bad_updates",
    "train.warmup_steps": "train.warmup_updates",
}
"""Keys of earlier versions, and their present names."""

INSTEAD = {"hydra/launcher": "cluster=slurm", "hydra/sweeper": "search.trials=N"}
"""What to type in place of one of Hydra's plugins."""


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
    if group in groups(conf_dirs) and all(isinstance(value, str | None) for value in values):
        choices = group_choices(group, conf_dirs)
        has = f"({key} has: {', '.join(choices)})"
        return [
            f"{key}={one}: no such choice{nearest(str(one), choices)} {has}" for one in values if one not in choices
        ]
    if _is_known(key):
        return [problem for value in values if (problem := _type_problem(schema, key, value))]
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
    keys = declared_keys(Config).items()
    return any(is_within(known, key) or (data["is_dictionary"] and is_within(key, known)) for known, data in keys)


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
