"""The student answers prompts with the weights it has, and the teacher scores every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.types import Prompt, Rollout


@dataclass
class OnPolicy(RolloutSource):
    """Sync, sample, score. `sample` and `score` are also the parts that other sources are made of."""

    prompts: PromptOrder | PromptStream
    generations_per_prompt: int
    worker: RolloutWorker
    scoring: ScoringWorker
    stages: Stages
    recorder: Recorder | None = None
    """Keeps each step's scores; None if they are not kept."""

    @property
    def fingerprint(self) -> str | None:
        return self.prompts.fingerprint

    def step(self, step: int) -> ScoredBatch:
        return self.score(self.sample(self.prompts_of(step), step=step), step=step)

    def prompts_of(self, step: int) -> list[Prompt]:
        """Return one prompt for each of the step's sequences."""
        return [prompt for prompt in self.prompts.batch(step - 1) for _ in range(self.generations_per_prompt)]

    def sample(self, prompts: Sequence[Prompt], *, step: int, places: Sequence[int] | None = None) -> list[Rollout]:
        """Sample with the weights that the student has before `step`; `places` as in `RolloutWorker.sample`."""
        with self.stages.awake(self.worker.sampler):
            with self.stages("sync"):
                self.worker.sync(step - 1)
            self.stages.check_stop(within_s=self.stages.longest_s)
            with self.stages("sample"):
                rollouts = self.worker.sample(prompts, step=step, places=places)
        self.stages.check_stop()  # an engine that was interrupted has not answered all
        return rollouts

    def score(self, rollouts: Sequence[Rollout], *, step: int) -> ScoredBatch:
        """Score the step's sequences, and record them."""
        with self.stages.awake(self.scoring.teacher), self.stages("score"):
            batch = replace(self.scoring.score(rollouts), metrics=self.worker.failures())
        if self.recorder is not None and not self.stages.is_stopping():  # an interrupted engine has not scored all
            with self.stages("record"):
                self.recorder.write(step, batch)
        return batch
