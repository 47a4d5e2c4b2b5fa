"""Sample and score a step's sequences with the engines of all ranks.

Work is partitioned over the ranks' engines, with the same results on any number of them. Every rank has one of each and
calls it with the same arguments: a collective. An engine is awake only while it works. If a stop request may have
interrupted the engine, all ranks raise StopRequested instead of returning its results.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.base import AnsweringEngine, Sampler, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Outgoing
from distill_cli.losses.merged_eos import merge_topk
from distill_cli.parallel.sharing import EngineShare
from distill_cli.rollout.pack import Planner
from distill_cli.rollout.source import ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.turns import Turns, sample_turns
from distill_cli.types import Prompt, Rollout, Sample, TeacherScores


@dataclass(frozen=True)
class Responder:
    """How an engine's answers are sampled and judged, in training and in validation."""

    sampling: SamplingSettings
    seed: int
    """`train.seed`."""
    decode: Callable[[list[int]], str]
    verify: IsolatedVerifier | None = None
    turns: Turns | None = None
    """How answers continue after their first turn; None if they do not."""

    def seed_of(self, *, step: int, sequence: int) -> int:
        """Return the seed of one answer: unique to it, and the same on any number of ranks."""
        return ((self.seed * 1_000_003 + step) * 1_000_003 + sequence) % 2**63

    def respond(self, engine: AnsweringEngine, prompts: Sequence[Prompt], *, seeds: Sequence[int]) -> list[Rollout]:
        """Return one answer of this rank's engine to each prompt, rewarded by the environment or the verifier."""
        if self.turns is not None:
            return self.judge(sample_turns(prompts, self.turns, seeds, engine, self.sampling))
        samples = engine.sample([prompt.token_ids for prompt in prompts], seeds=seeds, sampling=self.sampling)
        return self.judge([Rollout(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)])

    def judge(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Reward the last turn of answers to examples with a reference answer; keep an environment's rewards."""
        if self.verify is None:
            return rollouts
        pairs = {
            index: (self.decode(rollout.sample.last_turn_ids), answer)
            for index, rollout in enumerate(rollouts)
            if (answer := rollout.prompt.example.answer) is not None and rollout.reward is None
        }
        rewards = dict(zip(pairs, self.verify(list(pairs.values())), strict=True))
        return [replace(rollout, reward=rewards.get(index, rollout.reward)) for index, rollout in enumerate(rollouts)]


@dataclass
class RolloutWorker:
    """Sample the student's answers and judge them."""

    sampler: Sampler
    weights: Callable[[], Iterable[Outgoing]]
    """Returns the student's weights as `sampler.sync` takes them. A collective."""
    version: Callable[[], int]
    """Returns the version of the student's weights: the number of its optimizer updates."""
    responder: Responder
    stages: Stages

    @property
    def share(self) -> EngineShare:
        return EngineShare.of_all_ranks(self.sampler.num_ranks, self.stages.parallel)

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

        def answer(mine: list[int]) -> list[tuple[Sample, float | None]]:
            seeds = [self.responder.seed_of(step=step, sequence=places[index]) for index in mine]
            rollouts = self.responder.respond(self.sampler, [prompts[index] for index in mine], seeds=seeds)
            return [(rollout.sample, rollout.reward) for rollout in rollouts]

        sampled = self.share.map(answer, [len(prompt.token_ids) for prompt in prompts])
        return [Rollout(prompt, *sampled[index]) for index, prompt in enumerate(prompts)]

    def failures(self) -> dict[str, float]:
        """Return the numbers of verifier and environment errors since the last call, over all ranks. A collective."""
        judges = {"verifier": self.responder.verify, "environment": self.responder.turns}
        names = [name for name, judge in judges.items() if judge is not None]
        counts = [judge.failures.take() * self.share.is_first for judge in judges.values() if judge is not None]
        if not counts:
            return {}
        parallel = self.stages.parallel
        totals = parallel.sum_of_ranks(torch.tensor(counts, dtype=torch.float32, device=parallel.device)).tolist()
        return {f"rollout/{name}_errors": total for name, total in zip(names, totals, strict=True)}


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

        def score(mine: list[int]) -> list[TeacherScores]:
            own = [rollouts[places[index]] for index in mine]
            return score_rollouts(own, teacher=self.teacher, merged_eos_ids=self.merged_eos_ids)

        with self.stages.awake(self.teacher), self.stages(stage):
            scored = self.share.map(score, [len(rollouts[place].ids_for_teacher) for place in places])
        self.stages.check_stop()
        by_place = {places[index]: scores for index, scores in scored.items()}
        return ScoredBatch(rollouts, plans, {place: by_place[place] for place in self.planner.local_places(plans)})

    def sample(self, prompts: Sequence[Prompt], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        """Return the teacher's answer to its version of each prompt, on all ranks."""

        def answer(mine: list[int]) -> list[Sample]:
            own, own_seeds = [prompts[index].ids_for_teacher for index in mine], [seeds[index] for index in mine]
            return self.teacher.sample(own, seeds=own_seeds, sampling=sampling)

        engines = EngineShare.of_all_ranks(self.teacher.num_ranks, self.stages.parallel)
        with self.stages.awake(self.teacher), self.stages("sample"):
            sampled = engines.map(answer, [len(prompt.ids_for_teacher) for prompt in prompts])
        self.stages.check_stop()
        return [sampled[index] for index in range(len(prompts))]


def score_rollouts(
    rollouts: Sequence[Rollout], *, teacher: Teacher, merged_eos_ids: Sequence[int] = ()
) -> list[TeacherScores]:
    """Score answers with the teacher, which may read prompts of its own before them.

    Args:
        merged_eos_ids: tokens that count as one (`model.eos_map`).
    """
    samples = [rollout.sample for rollout in rollouts]
    assert all(one.logp is not None or one.source != "student" for one in samples), "sampled with logp=False"
    scores = teacher.score(
        [rollout.ids_for_teacher for rollout in rollouts],
        response_starts=[len(rollout.prompt.ids_for_teacher) for rollout in rollouts],
    )
    return [
        merge_topk(score, sampled_ids=sample.token_ids, merged_eos_ids=merged_eos_ids)
        for sample, score in zip(samples, scores, strict=True)
    ]
