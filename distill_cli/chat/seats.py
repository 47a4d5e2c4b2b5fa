"""Where the engines of a chat are, and how much of a device each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """The place of an engine."""

    first_gpu: int = 0
    """Among the visible ones."""
    num_sharing: int = 1
    """Engines on the fullest of its GPUs, or on the CPUs, with itself."""


def seats(sizes: Sequence[int], *, num_gpus: int) -> list[Seat]:
    """Return a seat for each engine, given the numbers of their GPUs: neighbouring ones, shared as little as possible.

    Args:
        num_gpus: visible ones, 0 on CPUs; an engine that wants more is refused elsewhere.
    """
    if not num_gpus:
        return [Seat(num_sharing=len(sizes))] * len(sizes)
    loads, taken = [0] * num_gpus, list[range]()
    for size in (min(one, num_gpus) for one in sizes):
        windows = [range(first, first + size) for first in range(num_gpus - size + 1)]
        by_load = [(max(found := [loads[gpu] for gpu in window]), sum(found), window.start) for window in windows]
        taken.append(windows[by_load.index(min(by_load))])
        for gpu in taken[-1]:
            loads[gpu] += 1
    return [Seat(window.start, max(loads[gpu] for gpu in window)) for window in taken]
