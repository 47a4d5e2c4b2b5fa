"""Environments answer the student between its turns: a file here with a function `make()`, or `pkg.module:function`."""

from dataclasses import dataclass
from typing import Protocol

from distill_cli.types import Example


@dataclass(frozen=True)
class Observation:
    """The result of a turn."""

    text: str = ""
    """The user's message that the student reads next; not read if `done`."""
    reward: float | None = None
    """Reward of the whole sequence so far; None leaves it to the verifier, which judges the last turn."""
    done: bool = False


class Environment(Protocol):
    """One sequence's environment. The same example and responses must give the same observations everywhere."""

    def reset(self, example: Example) -> str:
        """Begin, and return the first user message, which replaces the example's question."""

    def step(self, response: str) -> Observation:
        """Answer a turn of the student, given as text without special tokens."""
