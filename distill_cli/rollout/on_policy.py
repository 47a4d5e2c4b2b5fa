"""On-policy sequences: the student samples them, the teacher scores every answer.

With `rollout.staleness` the sequences of a step are sampled that many steps before: by the weights that the student has
then. How many is fixed, so that a run gives the same numbers each time. They are scored when they are trained on.
"""

from dataclasses import dataclass, field, replace

from distill_cli.rollout.in_flight import InFlight
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.step_writer import StepWriter
from distill_cli.rollout.workers import ScoringWorker


@dataclass
class OnPolicy(RolloutSource):
    """Sync, sample, score; see `ScoringWorker.begins_early`."""

    writer: StepWriter
    scoring: ScoringWorker
    recorder: Recorder | None = None
    """Writes each step's scores to disk; None does not."""
    staleness: int = 0
    """Steps between the sampling of a step's sequences and their training."""
    in_flight: InFlight = field(default_factory=InFlight)
    """After the last step that was trained on."""
    _next: InFlight = field(default_factory=InFlight)

    def step(self, step: int) -> ScoredBatch:
        early = self.scoring.begin() if self.staleness == 0 else None
        keeps_some = self.staleness > 0 or self.writer.carry_over is not None
        now = self.in_flight if keeps_some else InFlight(sampled_step=step - 1)
        while now.sampled_step < step + self.staleness:
            now = self.writer.write(now, early)
        first, *rest = now.waiting
        self._next = replace(now, waiting=tuple(rest))
        batch = self.scoring.score(first.rollouts, early=early, slots=first.slots)
        if self.recorder is not None:
            with self.writer.worker.stages("record"):
                self.recorder.write(step, batch)
        return replace(batch, is_current=self.staleness == 0, metrics={**batch.metrics, **first.metrics})

    def commit(self) -> None:
        self.in_flight = self._next

    @property
    def state(self) -> InFlight | None:
        return None if self.in_flight.is_empty else self.in_flight
