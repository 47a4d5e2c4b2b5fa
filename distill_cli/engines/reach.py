"""Declare the vLLM internals that this package uses, and check that they exist before the first use.

Importing this module imports neither vLLM nor torch. `vllm_patches` contains everything that is declared.
"""

import inspect
import pkgutil
from collections.abc import Callable
from contextlib import suppress
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
    """`name` or `Class.name`; several are spellings of different releases, of which one must exist."""
    used_by: str
    """The function of `vllm_patches`."""
    parameter: str | None = None
    """An argument that the named function must take."""
    only: str | None = None
    """`cpu` or `cuda` if one platform alone needs it, `adapter` if only `model.student.lora.sync=adapter` does."""
    replacement: Callable[[Any], Any] | None = None
    """Returns what replaces the name, given the original; None if the name is only used."""
    optional: bool = False
    """Older releases lack the name, and need no replacement, or fail for the models that need it alone."""


REACHES: list[Reach] = []


def reaches(
    module: str,
    *names: str,
    parameter: str | None = None,
    only: str | None = None,
    replaced: bool = False,
    optional: bool = False,
) -> Callable[[Function], Function]:
    """Declare a name inside vLLM that the decorated function depends on, or (`replaced`) makes a replacement for."""

    def declare(function: Function) -> Function:
        replacement = function if replaced else None
        REACHES.append(Reach(module, names, function.__name__, parameter, only, replacement, optional))
        return function

    return declare


def check_names(*, platform: str) -> None:
    """Raise DistillError with all of `REACHES` that this vLLM lacks, each as `module.name (used_by)`.

    Args:
        platform: `cpu` or `cuda` for what every engine there needs; `adapter` for what adapters need in addition.
    """
    missing, wanted = [], {platform} if platform == "adapter" else {platform, None}
    for reach in (reach for reach in REACHES if reach.only in wanted and not reach.optional):
        found = []
        for name in reach.names:
            with suppress(ImportError, AttributeError):
                found.append(pkgutil.resolve_name(f"{reach.module}:{name}"))
        spelled = " or ".join(f"{reach.module}.{name}" for name in reach.names)
        if not found:
            missing.append(f"{spelled} ({reach.used_by})")
        elif reach.parameter and reach.parameter not in inspect.signature(found[0]).parameters:
            missing.append(f"argument {reach.parameter} of {spelled} ({reach.used_by})")
    if missing:
        import vllm

        what = f"vLLM {vllm.__version__} lacks what engines in a trainer's process need: {'; '.join(missing)}"
        raise DistillError(f"{what}; {SEEN} have it: install one of these")


def replace_names(*, platform: str) -> None:
    """Put the declared replacements in place. Call `check_names` first."""
    for reach in REACHES:
        if reach.replacement is not None and reach.only in (platform, None):
            (name,) = reach.names
            path, _, attribute = f"{reach.module}.{name}".rpartition(".")
            with suppress(*((ImportError, AttributeError) if reach.optional else ())):
                owner = pkgutil.resolve_name(path)
                setattr(owner, attribute, reach.replacement(getattr(owner, attribute)))
