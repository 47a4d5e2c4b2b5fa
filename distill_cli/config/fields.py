"""How config sections are declared: frozen dataclasses whose fields carry limits and where they may change.

    @section
    class TrainConfig:
        max_steps: int = key(1000, at_least=1, resume=True)

A property that a key does not set is its section's, up to the whole config; unset there, it is False.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, is_dataclass
from functools import cache
from typing import Any, TypeVar, dataclass_transform

Section = TypeVar("Section")

PROPERTIES = {"resume", "replay", "evaluation"}
"""May change when a run is resumed; may differ from the recorded run in a replay; is read by `distill eval`."""
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt
}  # fmt: skip
"""Bounds of a number. null is always within them; infinity and NaN never are."""


@dataclass_transform(frozen_default=True)
def section(cls: type[Section]) -> type[Section]:
    """Make a dataclass that raises FrozenInstanceError on assignment.

    `dataclass(frozen=True)` does not do: OmegaConf makes its nodes read-only, and Hydra cannot merge into those.
    """

    def freeze(self: Any) -> None:
        self.__dict__["_is_frozen"] = True

    def refuse(self: Any, name: str, *value: Any) -> None:
        if self.__dict__.get("_is_frozen"):
            raise FrozenInstanceError(f"{type(self).__name__}.{name}: a config does not change; use override()")
        object.__setattr__(self, name, *value)

    for name, method in {"__post_init__": freeze, "__setattr__": refuse, "__delattr__": refuse}.items():
        setattr(cls, name, method)
    return dataclasses.dataclass(cls)


def key(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    **metadata: bool | float | str | Mapping[str, str],
) -> Any:
    """Declare a key, or a section in a section.

    Args:
        metadata: any of `PROPERTIES` and `LIMITS`; `only_with` is a key (or several, `a or b`) without which this one
            has no effect; `credentials` is the environment variable that carries an address whole, if it may hold
            credentials: files have it without them; `schedule` if a value may be a dictionary of values by numbers of
            steps; `entries` makes a dictionary one of named sections (see
            `declared_as`).
    """
    assert metadata.keys() <= PROPERTIES | LIMITS.keys() | {"only_with", "credentials", "entries", "schedule"}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr="credentials" not in metadata)


@cache
def declared_keys(root: type) -> dict[str, Mapping[str, Any]]:
    """Return each dotted key of a section with its metadata, which includes its sections' and `is_dictionary`."""
    keys: dict[str, Mapping[str, Any]] = {}
    for field in dataclasses.fields(root):
        kind = field.default_factory
        if isinstance(kind, type) and is_dataclass(kind):
            inner = declared_keys(kind).items()
            keys |= {f"{field.name}.{name}": {**field.metadata, **metadata} for name, metadata in inner}
        else:
            keys[field.name] = {**field.metadata, "is_dictionary": kind is dict}
    return keys


def declared_as(root: type, dotted: str) -> str:
    """Return the key that declares `dotted`: another one for a key of a named section, else itself.

    The sections of a dictionary with `entries` are declared elsewhere: below <dictionary>.<name> a key whose first part
    is in `entries` is declared in the section that it names, and any other key in that of the part "".
    """
    for known, data in declared_keys(root).items():
        if "entries" in data and dotted.startswith(f"{known}."):
            _, *parts = dotted.removeprefix(f"{known}.").split(".")
            if parts:
                rest = parts[1:] if parts[0] in data["entries"] else parts
                return ".".join([data["entries"].get(parts[0], data["entries"][""]), *rest])
    return dotted


def has_property(root: type, dotted: str, name: str) -> bool:
    """Whether the key `dotted` of the section `root` has the property `name`. A section has it if any key in it does.

    Keys below a dictionary have the dictionary's properties.
    """
    keys, dotted = declared_keys(root).items(), declared_as(root, dotted)
    return any(data.get(name, False) for key, data in keys if is_within(key, dotted) or is_within(dotted, key))


def is_within(key: str, other: str) -> bool:
    """Whether a dotted key is `other`, or lies in the section or dictionary `other`."""
    return f"{key}.".startswith(f"{other}.")


def flatten(node: Any, at: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys."""
    if not isinstance(node, dict) or not node:
        return {at: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= flatten(value, f"{at}.{name}" if at else str(name))
    return flat
