"""Names inside vLLM that this package depends on: declared where they are used, and looked up before they are.

Importing this module imports neither vLLM nor torch. `vllm_patches` has all that is declared.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from distill_cli.errors import DistillError

Function = TypeVar("Function", bound=Callable)

SEEN = "0.25.1 to 0.33.0"
"""Releases of vLLM whose source has every name."""


@dataclass(frozen=True)
class Reach:
    """A name inside vLLM that a function depends on."""

    module: str
    names: tuple[str, ...]
    """`name` or `Class.name`; several are spellings of different releases, of which one must be there."""
    used_by: str
    """The function of `vllm_patches`."""
    parameter: str | None = None
    """An argument that the named function must take."""
    only: str | None = None
    """`cpu` or `cuda` if one platform alone needs it, `adapter` if only `model.student.lora.sync=adapter` does."""


REACHES: list[Reach] = []


def reaches(
    module: str, *names: str, parameter: str | None = None, only: str | None = None
) -> Callable[[Function], Function]:
    """Declare a name inside vLLM that the decorated function depends on; the arguments are `Reach`'s."""

    def declare(function: Function) -> Function:
        REACHES.append(Reach(module, names, function.__name__, parameter, only))
        return function

    return declare


MISSING = object()
"""Returned for a name that this vLLM lacks."""


def find_name(module_name: str, name: str) -> Any:
    """Return `module.name` or `module.Class.name`, which may be None; `MISSING` if this vLLM has no such name."""
    try:
        return pkgutil.resolve_name(f"{module_name}:{name}")
    except (ImportError, AttributeError):
        return MISSING


def missing_names(*, platform: str) -> list[str]:
    """Return what this vLLM lacks of `REACHES`, each as `module.name (used_by)`.

    Args:
        platform: `cpu` or `cuda` for what every engine there needs; `adapter` for what adapters need besides.
    """
    missing, wanted = [], {platform} if platform == "adapter" else {platform, None}
    for reach in (reach for reach in REACHES if reach.only in wanted):
        found = [value for name in reach.names if (value := find_name(reach.module, name)) is not MISSING]
        spelled = " or ".join(f"{reach.module}.{name}" for name in reach.names)
        if not found:
            missing.append(f"{spelled} ({reach.used_by})")
        elif reach.parameter and reach.parameter not in inspect.signature(found[0]).parameters:
            missing.append(f"argument {reach.parameter} of {spelled} ({reach.used_by})")
    return missing


def check_names(*, platform: str) -> None:
    """Raise DistillError with every name of `missing_names`."""
    missing = missing_names(platform=platform)
    if missing:
        import vllm

        raise DistillError(
            f"vLLM {vllm.__version__} lacks what engines in a trainer's process need: {'; '.join(missing)}; "
            f"{SEEN} have it: install one of these"
        )


def replace_name(module_name: str, name: str, replacement: Any) -> None:
    """Set `module.name` or `module.Class.name`."""
    owner, _, attribute = f"{module_name}.{name}".rpartition(".")
    setattr(pkgutil.resolve_name(owner), attribute, replacement)
