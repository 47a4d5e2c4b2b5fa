"""Sources of a step's sequences: the trainer takes scored batches from a source.

| source     | file          | sequences                                                               |
|------------|---------------|-------------------------------------------------------------------------|
| `OnPolicy` | `on_policy`   | the student's, with its current weights; in part another's (`off_policy`) |
| `Replay`   | `score_files` | recorded by another run, with their scores                              |

A source may keep sequences from one step for a later one, or wrap another source; `ranks.build_source` chooses it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.in_flight import InFlight
from distill_cli.rollout.pack import BatchPlan, MicroBatch, micro_batches
from distill_cli.types import Rollout, TeacherScores


@dataclass(frozen=True)
class ScoredBatch:
    """A step's sequences, and the teacher's scores of those that this rank trains on."""

    rollouts: Sequence[Rollout]
    """All sequences of the step in its order, equal on all ranks."""
    plans: Sequence[BatchPlan]
    """The micro-batches of each global batch, by place in `rollouts`."""
    scores: Mapping[int, TeacherScores]
    """By place in `rollouts`: exactly this rank's part of `plans`, in the order of `plans`."""
    is_current: bool = True
    """Whether the student sampled its sequences with its current weights, so that the sampler's log-probabilities must
    equal the trainer's; otherwise they may have drifted apart."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The source's own metrics of the step."""
    slots: Sequence[int] | None = None
    """The slot of each sequence (`rollout.carry_over`); None if each has its own."""

    def micro_batches(self, parallel: Parallel) -> list[MicroBatch]:
        """Lay out this rank's micro-batches of all global batches, in their order."""
        plans = self.plans
        return [one for plan in plans for one in micro_batches(plan, self.rollouts, self.scores, parallel=parallel)]


class RolloutSource(Protocol):
    """Returns one batch per step. Every rank calls it at the same steps: a collective."""

    @abstractmethod
    def step(self, step: int) -> ScoredBatch:
        """Return the batch of `step`, counted from 1; only the step, the student's weights, the length guard's state
        and what is in flight determine it.

        Raises:
            StopRequested: a rank received a stop request.
        """

    def commit(self) -> None:
        """Keep what the last `step` left in flight: the student learns from its batch now."""
        return

    @property
    def state(self) -> InFlight | None:
        """What a checkpoint keeps of the source; None if the step's number says it all."""
        return None
