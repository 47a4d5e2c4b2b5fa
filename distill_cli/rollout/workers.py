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
from distill_cli.engines.base import AnsweringEngine, OnEnd, Sampler, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Outgoing
from distill_cli.parallel.sharing import EngineShare
from distill_cli.rollout.early_scores import BATCH_TOKENS, EarlyScores, deliver, submit_rollouts
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

    def respond(
        self,
        engine: AnsweringEngine,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[int],
        on_end: OnEnd | None = None,
    ) -> list[Rollout]:
        """Return one answer of this rank's engine to each prompt, rewarded by the environment or the verifier.

        Args:
            on_end: called with each answer, all its turns, when it has ended.
        """
        if self.turns is not None:
            return self.judge(sample_turns(prompts, self.turns, seeds, engine, self.sampling, on_end=on_end))
        token_ids = [prompt.token_ids for prompt in prompts]
        samples = engine.sample(token_ids, seeds=seeds, sampling=self.sampling, on_end=on_end)
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

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        places: Sequence[int] | None = None,
        early: EarlyScores | None = None,
    ) -> list[Rollout]:
        """Return one judged answer to each prompt, on all ranks. Call it inside `ready`.

        Args:
            places: of the prompts' sequences in the step; None counts up from 0. Step and place make an answer's seed,
                so that every engine samples the same answer.
            early: takes the sequences of this rank as they end.
        """
        places = range(len(prompts)) if places is None else places

        def answer(mine: list[int]) -> list[tuple[Sample, float | None]]:
            own = [prompts[index] for index in mine]
            seeds = [self.responder.seed_of(step=step, sequence=places[index]) for index in mine]

            def end(index: int, sample: Sample) -> None:
                assert early is not None
                early.add(places[mine[index]], Rollout(own[index], sample))

            rollouts = self.responder.respond(self.sampler, own, seeds=seeds, on_end=None if early is None else end)
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
    begins_early: bool = False
    """Whether a sequence is scored when it ends, while others are still sampled (`rollout.score_while_sampling`)."""
    share: EngineShare = field(init=False)

    def __post_init__(self) -> None:
        self.share = EngineShare.near_training(self.teacher.num_ranks, self.stages.parallel)

    def begin(self) -> EarlyScores | None:
        """Return what scores a step's sequences as they end; None if they are scored when all have ended."""
        if not self.begins_early:
            return None
        batch_tokens = BATCH_TOKENS[self.stages.parallel.device.type]
        return EarlyScores(self.teacher, batch_tokens=batch_tokens, merged_eos_ids=self.merged_eos_ids)

    def score(
        self, rollouts: Sequence[Rollout], *, stage: str = "score", early: EarlyScores | None = None
    ) -> ScoredBatch:
        """Plan the micro-batches of a step's sequences, and score this rank's.

        Neighbouring ranks partition their sequences over their engines and exchange the scores.

        Args:
            stage: the stage that the time counts for.
            early: has taken the student's answers already.
        """
        plans = self.planner.plan(rollouts)
        members = [place for plan in plans for rank in self.share.data_ranks for place in plan.members_of(rank)]
        is_done = [early is not None and rollout.sample.source == "student" for rollout in rollouts]
        places = [place for place in members if not is_done[place]]

        def score(mine: list[int]) -> list[TeacherScores]:
            own = [rollouts[places[index]] for index in mine]
            return submit_rollouts(own, self.teacher, merged_eos_ids=self.merged_eos_ids)()

        with self.stages.awake(self.teacher), self.stages(stage):
            costs = [len(rollouts[place].ids_for_teacher) for place in places]
            scored = self.share.map(score, costs) if places else {}
            by_place = {places[index]: scores for index, scores in scored.items()}
            if early is not None:
                ranks = self.stages.parallel.data_ranks
                by_place |= deliver(early.collect(), [[p for plan in plans for p in plan.members_of(r)] for r in ranks])
        self.stages.check_stop()
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
