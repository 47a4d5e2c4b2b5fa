"""The teachers of a run: `model.teacher`, or several by name (`model.teachers`).

Everything that depends on one teacher reads the config of a run with that teacher alone (`teacher_configs`), where its
model is `model.teacher`, its engine `engine.teacher` and its loss `loss`. A run with several teachers has several such
configs, and code that handles one teacher handles each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill_cli.config.choices import nearest
from distill_cli.config.fields import declared_as, declared_keys, flatten
from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError

ONLY = "teacher"
"""The name of a run's teacher if it has no other."""
MOST_TEACHERS = 32
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SECTIONS: Mapping[str, str] = declared_keys(Config)["model.teachers"]["entries"]
"""The section that each part of an entry changes; "" is the entry itself."""
DATA_KEYS = ("teacher_context", "teacher_prompt_template", "max_teacher_prompt_tokens")
"""Keys of `data` that a teacher may have of its own."""
SHARED_LOSS_KEYS = ("topk", "support", "reward", "penalty", "penalty_share")
"""Keys of `loss` that all teachers share."""


def teacher_names(config: Config) -> tuple[str, ...]:
    """Return the teachers' names in the config's order, which is the order in which they score."""
    return tuple(map(str, config.model.teachers)) or (ONLY,)


def model_key(name: str) -> str:
    """Return the section of a teacher."""
    return "model.teacher" if name == ONLY else f"model.teachers.{name}"


def path_key(name: str) -> str:
    """Return the key of a teacher's path."""
    return f"{model_key(name)}.path"


def engine_key(name: str) -> str:
    """Return the section of a teacher's engine."""
    return "engine.teacher" if name == ONLY else f"model.teachers.{name}.engine"


def teacher_configs(config: Config) -> dict[str, Config]:
    """Return, by name, the config of a run with each teacher alone; a run with one teacher has its own.

    Raises:
        ConfigError: an entry of `model.teachers` is wrong (see `teacher_problems`).
    """
    if not config.model.teachers:
        return {ONLY: config}
    return {str(name): _alone(config, name, entry) for name, entry in config.model.teachers.items()}


def own_temperatures(config: Config) -> dict[str, float]:
    """Return the temperatures, by name, of the teachers whose temperature is not the run's."""
    found = {name: one.loss.temperature for name, one in teacher_configs(config).items()}
    return {name: temperature for name, temperature in found.items() if temperature != config.loss.temperature}


def _alone(config: Config, name: str, entry: Any) -> Config:
    if not isinstance(entry, dict):
        raise ConfigError(_no_entry(name, entry))
    changed = override(config, {"model.teachers": {}})
    for part, keys in _parts(entry).items():
        section = changed
        for one in SECTIONS[part].split("."):
            section = getattr(section, one)
        try:
            merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), keys))
        except OmegaConfBaseException as error:
            at = f"model.teachers.{name}" + (f".{part}" if part else "")
            raise ConfigError(f"{at}: {str(error).splitlines()[0]}") from error
        changed = override(changed, {SECTIONS[part]: merged})
    return changed


def _parts(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return an entry's keys by the section that they change."""
    own = {key: value for key, value in entry.items() if key not in SECTIONS}
    return {"": own} | {part: dict(entry[part]) for part in SECTIONS if part and entry.get(part)}


def teacher_problems(config: Config) -> Iterator[str]:
    """Yield one line for each name or key of `model.teachers` that cannot be."""
    known = declared_keys(Config)
    if len(config.model.teachers) > MOST_TEACHERS:
        yield f"model.teachers: has {len(config.model.teachers)} teachers, must be at most {MOST_TEACHERS}"
    for name, entry in config.model.teachers.items():
        at = f"model.teachers.{name}"
        if not NAME.fullmatch(str(name)):
            yield f"{at}: a name has letters, digits, _, - and .; choose another"
        if not isinstance(entry, dict):
            yield _no_entry(name, entry)
            continue
        for key, value in flatten(entry).items():
            declared = declared_as(Config, f"{at}.{key}")
            section, _, last = declared.rpartition(".")
            if declared not in known and not any(declared.startswith(f"{one}.") for one in _dictionaries()):
                yield f"{at}.{key}: unknown key{nearest(declared, [one for one in known if one.startswith(section)])}"
            elif section == "data" and last not in DATA_KEYS:
                yield f"{at}.{key}: a teacher's own keys of data are {', '.join(DATA_KEYS)}; leave it out"
            elif section == "loss" and last in SHARED_LOSS_KEYS:
                yield f"{at}.{key}={value}: all teachers have one loss.{last}; set that"
            elif declared == "data.teacher_context" and value not in (None, config.data.teacher_context):
                yield f"{at}.{key}={value}: is the column data.teacher_context, or null; set that"


def _no_entry(name: str, entry: object) -> str:
    at = f"model.teachers.{name}"
    return f"{at}={entry}: must be the keys of a teacher, such as {at}.path=..."


def _dictionaries() -> list[str]:
    return [key for key, data in declared_keys(Config).items() if data["is_dictionary"]]
