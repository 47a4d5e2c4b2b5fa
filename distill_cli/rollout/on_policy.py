"""On-policy sequences: the student samples with its current weights, the teacher scores every answer.

A share of a step's sequences may be the dataset's or the teacher's (`off_policy`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.rollout.length_guard import LengthGuard
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
    guard: LengthGuard | None = None
    """Lets the teacher write some of the student's answers."""

    def step(self, step: int) -> ScoredBatch:
        prompts = [prompt for prompt in self.prompts.batch(step - 1) for _ in range(self.generations_per_prompt)]
        stages, responder = self.worker.stages, self.worker.responder
        fraction, seed = self.on_policy_fraction, responder.seed
        off = off_policy_places(len(prompts), on_policy_fraction=fraction, seed=seed, step=step)
        on = sorted(set(range(len(prompts))) - set(off))
        guarded = self.guarded_places(on, step=step)
        on = sorted(set(on) - set(guarded))
        early = self.scoring.begin()
        with self.worker.ready():
            stages.check_stop(within_s=stages.longest_s)
            with stages("sample"):
                own = self.worker.sample([prompts[place] for place in on], step=step, places=on, early=early)
        rollouts = dict(zip(on, own, strict=True))
        for places, write in ((off, self.write_others), (guarded, self.guard.write if self.guard else None)):
            if places and write is not None:
                seeds = [responder.seed_of(step=step, sequence=place) for place in places]
                samples = zip(places, write([prompts[place] for place in places], seeds), strict=True)
                rollouts |= {place: Rollout(prompts[place], sample) for place, sample in samples}
        batch = self.scoring.score([rollouts[place] for place in range(len(prompts))], early=early)
        if self.recorder is not None:
            with stages("record"):
                self.recorder.write(step, batch)
        shares = {} if self.guard is None else {"rollout/guard_share": len(guarded) / len(prompts)}
        return replace(batch, metrics={**batch.metrics, **shares, **self.worker.failures()})

    def guarded_places(self, places: Sequence[int], *, step: int) -> list[int]:
        """Draw which of the student's places the length guard gives to the teacher, in rising order."""
        share = 0.0 if self.guard is None else self.guard.share
        seed = self.worker.responder.seed
        drawn = off_policy_places(len(places), on_policy_fraction=1 - share, seed=seed, step=step)
        return [places[index] for index in drawn]
