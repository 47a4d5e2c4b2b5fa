"""How config sections and their keys are declared: frozen dataclasses whose fields carry what may be done with them.

    @section
    class TrainConfig:
        max_steps: int = key(1000, resume=True)

A property that a key does not set is that of the section it is in, up to the whole config; unset there, it is False.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_type_hints

Section = TypeVar("Section", bound=type)

PROPERTIES = ("resume", "replay", "evaluation")
"""May change when a run is resumed; may differ from the recorded run in a replay; is read by `distill eval`."""


@dataclass_transform(frozen_default=True)
def section(cls: Section) -> Section:
    """Make a dataclass that raises FrozenInstanceError on assignment.

    `dataclass(frozen=True)` does not do: OmegaConf makes its nodes read-only, and Hydra cannot merge into those.
    """
    made = dataclasses.dataclass(cls)
    init = made.__init__

    @wraps(init)
    def init_and_freeze(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.__dict__["_is_frozen"] = True

    def refuse(self: Any, name: str, *value: Any) -> None:
        if self.__dict__.get("_is_frozen"):
            raise FrozenInstanceError(f"{type(self).__name__}.{name}: a config does not change; use override()")
        object.__setattr__(self, name, *value)

    made.__init__, made.__setattr__, made.__delattr__ = init_and_freeze, refuse, refuse
    return made


def key(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    resume: bool | None = None,
    replay: bool | None = None,
    evaluation: bool | None = None,
    credentials: str | None = None,
) -> Any:
    """A field of a section with its properties (see `PROPERTIES`); None inherits the section's.

    Args:
        credentials: the environment variable that carries an address whole, if it may hold credentials: files have it
            without them.
    """
    properties = {"resume": resume, "replay": replay, "evaluation": evaluation, "credentials": credentials}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=properties)
    return dataclasses.field(default=default, metadata=properties, repr=credentials is None)


def has_property(root: type, dotted: str, name: str) -> bool:
    """Whether the key `dotted` of the section `root` has the property `name`. A section has it if any key in it does.

    Keys below a dictionary have the dictionary's properties.
    """
    value = False
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(root):
            return value
        fields = {field.name: field for field in dataclasses.fields(root)}
        if part not in fields:
            return value
        own = fields[part].metadata.get(name)
        value = value if own is None else own
        root = get_type_hints(root)[part]
    return value or any(has_property(root, leaf, name) for leaf in leaves(root))


def leaves(root: Any, at: str = "") -> Iterator[str]:
    """The dotted keys of a section that are no sections themselves."""
    if not dataclasses.is_dataclass(root):
        if at:
            yield at
        return
    for name, kind in get_type_hints(root).items():
        yield from leaves(kind, f"{at}.{name}" if at else name)
