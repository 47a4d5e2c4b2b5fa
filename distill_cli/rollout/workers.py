"""The work of all ranks' engines in a step: `RolloutWorker` samples and judges answers, `ScoringWorker` scores them.

Work is partitioned over the ranks' engines, with the same results on any number of them. Every rank has one of each and
calls it with the same arguments: a collective. An engine is awake only while it works. If a stop request may have
interrupted the engine, all ranks raise StopRequested instead of returning its results.
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
    """Sample the student's answers and judge them."""

    sampler: Sampler
    weights: Callable[[], Iterable[tuple[str, torch.Tensor | Deferred]]]
    """Returns the student's weights as `sampler.sync` takes them. A collective."""
    version: Callable[[], int]
    """Returns the version of the student's weights: the number of its optimizer updates."""
    sampling: SamplingSettings
    seed: int
    """`train.seed`."""
    stages: Stages
    decode: Callable[[list[int]], str]
    verify: IsolatedVerifier | None = None
    turns: Turns | None = None
    """How sequences continue after a first turn; None if they do not."""
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.of_all_ranks(self.sampler.num_ranks, self.stages.parallel)

    @contextmanager
    def ready(self) -> Iterator[Sampler]:
        """Yield the sampler, awake and with the student's weights; check for a stop at the end."""
        with self.stages.awake(self.sampler):
            with self.stages("sync"):
                version = self.version()
                if version != self.sampler.version:
                    self.sampler.sync(self.weights(), version=version)
                else:  # earlier samples, such as a validation's, must not change later ones
                    self.sampler.reset_prefix_cache()
            yield self.sampler
        self.stages.check_stop()

    def sample(self, prompts: Sequence[Prompt], *, step: int, places: Sequence[int] | None = None) -> list[Rollout]:
        """Return one judged answer to each prompt, on all ranks. Call it inside `ready`.

        Args:
            places: of the prompts' sequences in the step; None counts up from 0. Step and place make an answer's seed,
                so that every engine samples the same answer.
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
        """Return the numbers of verifier and environment errors since the last call, over all ranks. A collective."""
        sources: dict[str, IsolatedVerifier | Turns | None]
        sources = {"rollout/verifier_errors": self.verify, "rollout/environment_errors": self.turns}
        failures = {name: source.failures for name, source in sources.items() if source is not None}
        counts = {name: float(one.take() * self.share.is_first) for name, one in failures.items()}
        if not counts:
            return {}
        parallel = self.stages.parallel
        totals = parallel.sum_of_ranks(torch.tensor(list(counts.values()), device=parallel.device)).tolist()
        return dict(zip(counts, totals, strict=True))


@dataclass
class ScoringWorker:
    """Score the sequences that each rank trains on with the teacher. Building it is a collective."""

    teacher: Teacher
    planner: Planner
    stages: Stages
    merged_eos_ids: tuple[int, ...] = ()
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.near_training(self.teacher.num_ranks, self.stages.parallel)

    def score(self, rollouts: Sequence[Rollout], *, stage: str = "score") -> ScoredBatch:
        """Plan the micro-batches of a step's sequences, and score this rank's.

        Neighbouring ranks partition their sequences over their engines and exchange the scores.

        Args:
            stage: the stage that the time counts for.
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
        """Return the teacher's answer to its version of each prompt, on all ranks."""
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
