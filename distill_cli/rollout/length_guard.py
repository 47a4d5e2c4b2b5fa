"""Let the teacher write a share of the student's answers while too many of these reach the length limit.

A student that stops emitting EOS trains on its own endless answers, and writes more of them. The teacher's answers end:
in a mixture with them the student keeps ending its own. Stable-OPD (arXiv 2604.08527) mixes in correct answers at a
fixed share all along; here the share is there only when it is needed, and falls to 0 step by step (this project's
choice).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill_cli.types import Prompt, Sample


@dataclass
class LengthGuard:
    """The share of the next step. Every rank has one and observes the same rates."""

    above: float
    """The guard is on while more than this share of the student's answers reaches the length limit."""
    most: float
    """The teacher's share while it is on."""
    steps: int
    """Steps over which the share falls to 0 after that."""
    write: Callable[[Sequence[Prompt], Sequence[int], int], list[Sample]]
    """Returns the teacher's answers, given prompts, a seed for each and their greatest length
    (`off_policy.teacher_samples`). A collective."""
    left: int = 0
    """Steps until the share is 0: the guard's whole state."""

    @property
    def share(self) -> float:
        return self.most * self.left / self.steps

    def observe(self, truncated_rate: float) -> None:
        """Take in the rate of a finished step."""
        self.left = self.steps if truncated_rate > self.above else max(self.left - 1, 0)
