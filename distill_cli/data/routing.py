"""Whose a row is: its teachers among those of the run. No torch."""

from collections.abc import Sequence

from distill_cli.types import Example


def route(example: Example, names: Sequence[str]) -> dict[int, float]:
    """Return the weight of each of an example's teachers by its index in `names`; empty if one is not among them.

    An only teacher has all examples. Among several an example names its own, or belongs to the one with the name of its
    dataset.
    """
    if len(names) == 1:
        return {0: 1.0}
    weights = dict(example.teachers) or {example.dataset: 1.0}
    return {names.index(name): weight for name, weight in weights.items()} if weights.keys() <= {*names} else {}


def asked_for(example: Example) -> str:
    """Return the teachers that an example asks for, for messages."""
    return ", ".join(repr(name) for name, _ in example.teachers or ((example.dataset, 1.0),))
