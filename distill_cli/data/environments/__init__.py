"""What answers the student between its turns: a file here with a function `make()`, or `pkg.module:function`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distill_cli.types import Example


@dataclass(frozen=True)
class Observation:
    """What comes of a turn."""

    text: str = ""
    """What the student reads next, as a user's message; unread where it is done."""
    reward: float | None = None
    """Of the whole sequence, as far as it has come; None leaves it to the verifier, on the last turn's text."""
    done: bool = False


class Environment(Protocol):
    """One sequence's counterpart. The same example and responses must give the same observations everywhere."""

    def reset(self, example: Example) -> str:
        """Begins; what the student is asked first, in place of the example's question."""

    def step(self, response: str) -> Observation:
        """Answers a turn of the student's, as text without special tokens."""
