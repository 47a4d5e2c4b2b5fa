"""On-policy sequences: the student samples with its current weights, the teacher scores every answer.

A share of a step's sequences may be the dataset's or the teacher's (`off_policy`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.rollout.off_policy import off_policy_places
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.types import Prompt, Rollout, Sample


@dataclass
class OnPolicy(RolloutSource):
    """Sync, sample, score; see `ScoringWorker.begins_early`."""

    prompts: PromptOrder | PromptStream
    generations_per_prompt: int
    worker: RolloutWorker
    scoring: ScoringWorker
    recorder: Recorder | None = None
    """Writes each step's scores to disk; None does not."""
    on_policy_fraction: float = 1.0
    write_others: Callable[[Sequence[Prompt], Sequence[int]], list[Sample]] | None = None
    """Returns the other answers, given prompts and a seed for each: `dataset_samples` or `teacher_samples`. None if the
    student writes all. A collective."""

    def step(self, step: int) -> ScoredBatch:
        prompts = [prompt for prompt in self.prompts.batch(step - 1) for _ in range(self.generations_per_prompt)]
        stages, responder = self.worker.stages, self.worker.responder
        fraction, seed = self.on_policy_fraction, responder.seed
        off = off_policy_places(len(prompts), on_policy_fraction=fraction, seed=seed, step=step)
        on = sorted(set(range(len(prompts))) - set(off))
        early = self.scoring.begin()
        with self.worker.ready():
            stages.check_stop(within_s=stages.longest_s)
            with stages("sample"):
                own = self.worker.sample([prompts[place] for place in on], step=step, places=on, early=early)
        rollouts = dict(zip(on, own, strict=True))
        if off and self.write_others is not None:
            seeds = [responder.seed_of(step=step, sequence=place) for place in off]
            samples = self.write_others([prompts[place] for place in off], seeds)
            rollouts |= {place: Rollout(prompts[place], sample) for place, sample in zip(off, samples, strict=True)}
        batch = self.scoring.score([rollouts[place] for place in range(len(prompts))], early=early)
        if self.recorder is not None:
            with stages("record"):
                self.recorder.write(step, batch)
        return replace(batch, metrics={**batch.metrics, **self.worker.failures()})
