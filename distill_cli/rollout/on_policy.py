"""The student answers prompts with its current weights, and the teacher scores every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.types import Prompt, Rollout


@dataclass
class OnPolicy(RolloutSource):
    """Sync, sample, score. Other sources use `sample` and `score` too."""

    prompts: PromptOrder | PromptStream
    generations_per_prompt: int
    worker: RolloutWorker
    scoring: ScoringWorker
    recorder: Recorder | None = None
    """Writes each step's scores to disk; None does not."""

    def step(self, step: int) -> ScoredBatch:
        return self.score(self.sample(self.prompts_of(step), step=step), step=step)

    def prompts_of(self, step: int) -> list[Prompt]:
        """Return one prompt for each of the step's sequences."""
        return [prompt for prompt in self.prompts.batch(step - 1) for _ in range(self.generations_per_prompt)]

    def sample(self, prompts: Sequence[Prompt], *, step: int, places: Sequence[int] | None = None) -> list[Rollout]:
        """Sample with the student's weights; `places` as in `RolloutWorker.sample`."""
        stages = self.worker.stages
        with self.worker.ready():
            stages.check_stop(within_s=stages.longest_s)
            with stages("sample"):
                return self.worker.sample(prompts, step=step, places=places)

    def score(self, rollouts: Sequence[Rollout], *, step: int) -> ScoredBatch:
        """Score the step's sequences, and record them."""
        batch = self.scoring.score(rollouts)
        if self.recorder is not None:
            with self.worker.stages("record"):
                self.recorder.write(step, batch)
        return replace(batch, metrics=self.worker.failures())
