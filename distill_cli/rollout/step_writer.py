"""Write the sequences of each step: whole answers of the student, or parts of them (`carry_over`); in part others'.

A share of a step's sequences may be the dataset's or the teacher's (`off_policy`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.rollout.carry_over import CarryOver
from distill_cli.rollout.early_scores import EarlyScores
from distill_cli.rollout.in_flight import InFlight, SampledStep
from distill_cli.rollout.length_guard import LengthGuard
from distill_cli.rollout.off_policy import off_policy_places
from distill_cli.rollout.workers import RolloutWorker
from distill_cli.types import Prompt, Rollout, Sample

WriteOthers = Callable[[Sequence[Prompt], Sequence[int], int], list[Sample]]
"""Returns answers that the student does not write, given prompts, a seed for each and their greatest length:
`dataset_samples` or `teacher_samples`. A collective."""


@dataclass
class StepWriter:
    """Writes the sequences of one step after the other."""

    prompts: PromptOrder | PromptStream
    generations_per_prompt: int
    worker: RolloutWorker
    on_policy_fraction: float = 1.0
    write_others: WriteOthers | None = None
    """None if the student writes all."""
    guard: LengthGuard | None = None
    """Lets the teacher write some of the student's answers."""
    limit_at: Callable[[int], int | None] = lambda step: None
    """Returns the greatest length of an answer that is sampled in a step; None is the responder's."""
    carry_over: CarryOver | None = None
    """Writes the sequences instead, over several steps."""

    def write(self, now: InFlight, early: EarlyScores | None = None) -> InFlight:
        """Return what is in flight with the step after the last sampled one. A collective.

        Args:
            early: takes this rank's sequences as they end.
        """
        step = now.sampled_step + 1
        if self.carry_over is None:
            sampled, slots = self._sample_whole(step, early), now.slots
        else:
            limit = self.worker.responder.sampling_up_to(self.limit_at(step)).max_new_tokens
            with self._sampling():
                sampled, slots = self.carry_over.write(now.slots, step=step, limit=limit, early=early)
        sampled = replace(sampled, metrics={**sampled.metrics, **self.worker.failures()})
        return InFlight(step, (*now.waiting, sampled), slots)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Keep the sampler awake, and time the block as `sample`."""
        stages = self.worker.stages
        with self.worker.ready():
            stages.check_stop(within_s=stages.longest_s)
            with stages("sample"):
                yield

    def _sample_whole(self, step: int, early: EarlyScores | None) -> SampledStep:
        """Sample the whole answers of a step."""
        prompts = [prompt for prompt in self.prompts.batch(step - 1) for _ in range(self.generations_per_prompt)]
        fraction, responder, limit = self.on_policy_fraction, self.worker.responder, self.limit_at(step)
        off = off_policy_places(len(prompts), on_policy_fraction=fraction, seed=responder.seed, step=step)
        on = sorted(set(range(len(prompts))) - set(off))
        guarded = self.guarded_places(on, step=step)
        on = sorted(set(on) - set(guarded))
        with self._sampling():
            asked = [prompts[place] for place in on]
            own = self.worker.sample(asked, step=step, places=on, early=early, max_new_tokens=limit)
        rollouts = dict(zip(on, own, strict=True))
        for places, write in ((off, self.write_others), (guarded, self.guard.write if self.guard else None)):
            if places and write is not None:
                seeds = [responder.seed_of(step=step, sequence=place) for place in places]
                length = responder.sampling_up_to(limit).max_new_tokens
                samples = zip(places, write([prompts[place] for place in places], seeds, length), strict=True)
                rollouts |= {place: Rollout(prompts[place], sample) for place, sample in samples}
        origins = tuple((step - 1, place // self.generations_per_prompt) for place in range(len(prompts)))
        shares = {} if self.guard is None else {"rollout/guard_share": len(guarded) / len(prompts)}
        return SampledStep(tuple(rollouts[place] for place in range(len(prompts))), origins, metrics=shares)

    def guarded_places(self, places: Sequence[int], *, step: int) -> list[int]:
        """Draw which of the student's places the length guard gives to the teacher, in rising order."""
        share = 0.0 if self.guard is None else self.guard.share
        seed = self.worker.responder.seed
        drawn = off_policy_places(len(places), on_policy_fraction=1 - share, seed=seed, step=step)
        return [places[index] for index in drawn]
