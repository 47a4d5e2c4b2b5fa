"""The model families that were tried, and how each came out: `families.json`, which scripts/check_families.py writes.

A family that is not listed was not tried: it may work, and `distill check` tells. No torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "families.json"
AXES = ("tensor", "context", "expert")
LAYOUTS = ("shard", *AXES)
"""How a student was trained on two ranks, and compared with plain transformers."""

WRONG = ("failed", "differs")
"""What results of layouts begin with that are neither right nor refused."""


@dataclass(frozen=True)
class Family:
    """A family's results; texts say what failed or why it is refused."""

    name: str
    layouts: Mapping[str, float | str]
    """By axis, and `one rank`: the largest relative difference from plain transformers, or a text."""
    checks: Mapping[str, str]
    """`full` and `lora`: `ok` if `distill check` passed with such a student."""

    @property
    def trains(self) -> bool:
        """Whether the student's updates are those of plain transformers."""
        return isinstance(self.layouts.get("one rank"), float)

    @property
    def difference(self) -> float | None:
        """The largest difference over the layouts that work."""
        return max((value for value in self.layouts.values() if isinstance(value, float)), default=None)

    def axes(self) -> list[str]:
        """Return the axes of the mesh over which the student can be cut."""
        return [axis for axis in LAYOUTS if isinstance(self.layouts.get(axis), float)]

    @property
    def is_served(self) -> bool:
        """Whether vLLM's engines agreed with the trainer: as a teacher, and after a sync as a student."""
        return self.checks.get("full") == "ok"


@cache
def tried() -> dict[str, Family]:
    """Return the families that were tried, by name."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())["families"]
    return {name: Family(name, one.get("layouts", {}), one.get("checks", {})) for name, one in found.items()}


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that the families were tried with."""
    return json.loads(FILE.read_text())["versions"]


def failure(family: str, layout: str) -> str | None:
    """Return how a student of a family came out of a layout (`one rank` or an axis), if that was tried and is wrong."""
    known = tried().get(family)
    value = known.layouts.get(layout) if known else None
    return value if isinstance(value, str) and value.startswith(WRONG) else None
