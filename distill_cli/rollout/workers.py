"""What the engines of all ranks do for a step: `RolloutWorker` has answers sampled and judged, `ScoringWorker` scored.

Work is shared out over the ranks' engines, and results are the same on any number of them. Every rank has one of each
and calls it with the same arguments: a collective. Wake the engine before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.base import Sampler, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Deferred
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.sharing import EngineShare, gather_items, partition_by_cost
from distill_cli.rollout.collect import judge_rollouts, sample_rollouts, score_rollouts, sequence_seed
from distill_cli.rollout.pack import Planner
from distill_cli.rollout.source import ScoredBatch
from distill_cli.rollout.turns import Turns
from distill_cli.types import Prompt, Rollout, Sample


@dataclass
class RolloutWorker:
    """Samples the student's answers and judges them."""

    sampler: Sampler
    weights: Callable[[], Iterable[tuple[str, torch.Tensor | Deferred]]]
    """The student's, as `sampler.sync` takes them. A collective."""
    sampling: SamplingSettings
    seed: int
    """`train.seed`."""
    parallel: Parallel
    decode: Callable[[list[int]], str]
    verify: IsolatedVerifier | None = None
    turns: Turns | None = None
    """How sequences go on after a first turn; None if they do not."""
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.of_all_ranks(self.sampler.num_ranks, self.parallel)

    def sync(self, version: int) -> None:
        """Give the sampler the student's weights, unless it has this version of them."""
        if version != self.sampler.version:
            self.sampler.sync(self.weights(), version=version)
        else:  # what was sampled before, a validation perhaps, must leave no trace in what comes
            self.sampler.reset_prefix_cache()

    def sample(self, prompts: Sequence[Prompt], *, step: int, places: Sequence[int] | None = None) -> list[Rollout]:
        """Return one judged answer to each prompt, on all ranks.

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
        totals = self.parallel.sum_of_ranks(torch.tensor(own, device=self.parallel.device)).tolist()
        return dict(zip(counted, totals, strict=True))


@dataclass
class ScoringWorker:
    """Scores with the teacher what each rank trains on. Building it is a collective."""

    teacher: Teacher
    planner: Planner
    parallel: Parallel
    one_class: tuple[int, ...] = ()
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.near_training(self.teacher.num_ranks, self.parallel)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """Plan how a step's sequences are trained on, and score those of this rank.

        Neighbouring ranks share their sequences out over their engines and send each other the scores.
        """
        plans = self.planner.plan(rollouts)
        places = [place for plan in plans for rank in self.share.data_ranks for place in plan.members_of(rank)]
        shares = partition_by_cost([len(rollouts[place].ids_for_teacher) for place in places], self.share.num_engines)
        mine = [rollouts[places[index]] for index in shares[self.share.index]]
        scores = score_rollouts(mine, teacher=self.teacher, one_class=self.one_class)
        scored = gather_items(scores, shares, group=self.share.group)
        by_place = {places[index]: scores for index, scores in scored.items()}
        return ScoredBatch(rollouts, plans, {place: by_place[place] for place in self.planner.local_places(plans)})

    def sample(self, prompts: Sequence[Prompt], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        """Return the teacher's own answer to each prompt as it reads it, on all ranks."""
        engines = EngineShare.of_all_ranks(self.teacher.num_ranks, self.parallel)
        shares = partition_by_cost([len(prompt.ids_for_teacher) for prompt in prompts], engines.num_engines)
        mine = shares[engines.index]
        samples = self.teacher.sample(
            [prompts[index].ids_for_teacher for index in mine],
            seeds=[seeds[index] for index in mine],
            sampling=sampling,
        )
        sampled = gather_items(samples, shares)
        return [sampled[index] for index in range(len(prompts))]
