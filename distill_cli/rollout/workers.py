"""What the engines of all ranks do for a step: `RolloutWorker` has answers sampled and judged, `ScoringWorker` scored.

Work is partitioned over the ranks' engines, and results are the same on any number of them. Every rank has one of each
and calls it with the same arguments: a collective. An engine is awake only while it works, and results that it may not
have finished, since the run is to stop, are not returned: StopRequested is raised on all ranks instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.base import Sampler, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Deferred
from distill_cli.parallel.sharing import EngineShare, gather_items, partition_by_cost
from distill_cli.rollout.collect import judge_rollouts, sample_rollouts, score_rollouts, sequence_seed
from distill_cli.rollout.pack import Planner
from distill_cli.rollout.source import ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.turns import Turns
from distill_cli.types import Prompt, Rollout, Sample


@dataclass
class RolloutWorker:
    """Samples the student's answers and judges them."""

    sampler: Sampler
    weights: Callable[[], Iterable[tuple[str, torch.Tensor | Deferred]]]
    """The student's, as `sampler.sync` takes them. A collective."""
    version: Callable[[], int]
    """Which weights the student has: the number of its optimizer updates."""
    sampling: SamplingSettings
    seed: int
    """`train.seed`."""
    stages: Stages
    decode: Callable[[list[int]], str]
    verify: IsolatedVerifier | None = None
    turns: Turns | None = None
    """How sequences go on after a first turn; None if they do not."""
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.of_all_ranks(self.sampler.num_ranks, self.stages.parallel)

    @contextmanager
    def ready(self) -> Iterator[Sampler]:
        """Give the sampler, awake within and with the student's weights; check for a stop at the end."""
        with self.stages.awake(self.sampler):
            with self.stages("sync"):
                version = self.version()
                if version != self.sampler.version:
                    self.sampler.sync(self.weights(), version=version)
                else:  # what was sampled before, a validation perhaps, must leave no trace in what comes
                    self.sampler.reset_prefix_cache()
            yield self.sampler
        self.stages.check_stop()

    def sample(self, prompts: Sequence[Prompt], *, step: int, places: Sequence[int] | None = None) -> list[Rollout]:
        """Return one judged answer to each prompt, on all ranks. Within `ready`.

        Args:
            places: which of the step's sequences they are; None is their order. An answer's seed is made of the step
                and its place, so that any engine samples it alike.
        """
        places = range(len(prompts)) if places is None else places
        shares = partition_by_cost([len(prompt.token_ids) for prompt in prompts], self.share.num_engines)
        mine = shares[self.share.index]
        rollouts = sample_rollouts(
            [prompts[number] for number in mine],
            seeds=[sequence_seed(self.seed, step=step, sequence=places[number]) for number in mine],
            engine=self.sampler,
            sampling=self.sampling,
            turns=self.turns,
        )
        if self.verify is not None:
            rollouts = judge_rollouts(rollouts, verify=self.verify, decode=self.decode)
        sampled = gather_items([(rollout.sample, rollout.reward) for rollout in rollouts], shares)
        return [Rollout(prompt, *sampled[number]) for number, prompt in enumerate(prompts)]

    def failures(self) -> dict[str, float]:
        """Count the answers that could not be judged and the environments that failed since the last call."""
        counted = {}
        if self.verify is not None:
            counted["rollout/verifier_errors"] = self.verify.failures
        if self.turns is not None:
            counted["rollout/environment_errors"] = self.turns.failures
        if not counted:
            return {}
        own = [float(failures.take() * self.share.is_first) for failures in counted.values()]
        parallel = self.stages.parallel
        totals = parallel.sum_of_ranks(torch.tensor(own, device=parallel.device)).tolist()
        return dict(zip(counted, totals, strict=True))


@dataclass
class ScoringWorker:
    """Scores with the teacher what each rank trains on. Building it is a collective."""

    teacher: Teacher
    planner: Planner
    stages: Stages
    merged_eos_ids: tuple[int, ...] = ()
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.near_training(self.teacher.num_ranks, self.stages.parallel)

    def score(self, rollouts: Sequence[Rollout], *, stage: str = "score") -> ScoredBatch:
        """Plan how a step's sequences are trained on, and score those of this rank.

        Neighbouring ranks partition their sequences over their engines and send each other the scores.

        Args:
            stage: what the time is accounted to.
        """
        plans = self.planner.plan(rollouts)
        places = [place for plan in plans for rank in self.share.data_ranks for place in plan.members_of(rank)]
        shares = partition_by_cost([len(rollouts[place].ids_for_teacher) for place in places], self.share.num_engines)
        mine = [rollouts[places[index]] for index in shares[self.share.index]]
        with self.stages.awake(self.teacher), self.stages(stage):
            scores = score_rollouts(mine, teacher=self.teacher, merged_eos_ids=self.merged_eos_ids)
            scored = gather_items(scores, shares, group=self.share.group)
        self.stages.check_stop()
        by_place = {places[index]: scores for index, scores in scored.items()}
        return ScoredBatch(rollouts, plans, {place: by_place[place] for place in self.planner.local_places(plans)})

    def sample(self, prompts: Sequence[Prompt], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        """Return the teacher's own answer to each prompt as it reads it, on all ranks."""
        engines = EngineShare.of_all_ranks(self.teacher.num_ranks, self.stages.parallel)
        shares = partition_by_cost([len(prompt.ids_for_teacher) for prompt in prompts], engines.num_engines)
        mine = shares[engines.index]
        with self.stages.awake(self.teacher), self.stages("sample"):
            samples = self.teacher.sample(
                [prompts[index].ids_for_teacher for index in mine],
                seeds=[seeds[index] for index in mine],
                sampling=sampling,
            )
            sampled = gather_items(samples, shares)
        self.stages.check_stop()
        return [sampled[index] for index in range(len(prompts))]
