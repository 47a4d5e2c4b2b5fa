"""Where a step's sequences come from. The trainer takes scored batches from a source, whatever made them.

| source      | file         | sequences                                                        |
|-------------|--------------|------------------------------------------------------------------|
| `OnPolicy`  | `on_policy`  | the student's, sampled with the weights that it has              |
| `Mixture`   | `off_policy` | some of them the dataset's or the teacher's instead              |
| `Replay`    | `recorded_steps` | those that another run recorded, with their scores           |

A source may hold sequences back from one step to the next, or wrap another source; `ranks.build_source` chooses it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from distill_cli.rollout.pack import BatchPlan
from distill_cli.types import Rollout, TeacherScores


@dataclass(frozen=True)
class ScoredBatch:
    """A step's sequences, and the teacher's scores of those that this rank trains on."""

    rollouts: Sequence[Rollout]
    """All of the step, in its order; every rank has the same."""
    plans: Sequence[BatchPlan]
    """How each global batch is cut up, by place in `rollouts`."""
    scores: Mapping[int, TeacherScores]
    """By place in `rollouts`: this rank's share of `plans` and no other, in the order of `plans`."""
    is_current: bool = True
    """Whether the student sampled its sequences with the weights it has now, so that its log-probabilities of them
    must be the trainer's; else they may have drifted apart."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the source counted."""


class RolloutSource(Protocol):
    """Gives the trainer one batch a step. Every rank calls it at the same steps: a collective."""

    @abstractmethod
    def step(self, step: int) -> ScoredBatch:
        """Return the batch of `step`, counted from 1, which follows from the step and the student's weights alone.

        Raises:
            StopRequested: any rank was asked to stop.
        """
