"""Sample and score a step's sequences with the engines of all ranks.

Work is partitioned over the ranks' engines, with the same results on any number of them. Every rank has one of each and
calls it with the same arguments: a collective. An engine is awake only while it works; several teachers take turns,
in the config's order. If a stop request may have
interrupted the engine, all ranks raise StopRequested instead of returning its results.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.base import AnsweringEngine, OnEnd, Sampler, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Outgoing
from distill_cli.losses.mixture import mix, uncertain_mass
from distill_cli.parallel.sharing import EngineShare
from distill_cli.rollout.early_scores import BATCH_TOKENS, EarlyScores, Place, Request, deliver, submit
from distill_cli.rollout.growing import sample_turns
from distill_cli.rollout.pack import BatchPlan, Planner
from distill_cli.rollout.source import ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.turns import Turns
from distill_cli.tokens.translation import Translation
from distill_cli.types import Prompt, Rollout, Sample, Target, TeacherScores


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
        max_new_tokens: int | None = None,
    ) -> list[Rollout]:
        """Return one answer of this rank's engine to each prompt, rewarded by the environment or the verifier.

        Args:
            on_end: called with each answer, all its turns, when it has ended.
            max_new_tokens: of a turn; None is the settings'.
        """
        sampling = self.sampling_up_to(max_new_tokens)
        if self.turns is not None:
            return self.judge(sample_turns(prompts, self.turns, seeds, engine, sampling, on_end=on_end))
        token_ids = [prompt.token_ids for prompt in prompts]
        samples = engine.sample(token_ids, seeds=seeds, sampling=sampling, on_end=on_end)
        return self.judge([Rollout(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)])

    def sampling_up_to(self, max_new_tokens: int | None) -> SamplingSettings:
        """Return the settings with another greatest length of a turn; None is their own."""
        return self.sampling if max_new_tokens is None else replace(self.sampling, max_new_tokens=max_new_tokens)

    def judge(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Reward the last turn of answers to examples with a reference answer; keep an environment's rewards.

        Answers that continue in a later step have none yet.
        """
        if self.verify is None:
            return rollouts
        pairs = {
            index: (self.decode(rollout.answer.last_turn_ids), answer)
            for index, rollout in enumerate(rollouts)
            if (answer := rollout.prompt.example.answer) is not None
            and rollout.reward is None
            and rollout.sample.finish_reason
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
        max_new_tokens: int | None = None,
    ) -> list[Rollout]:
        """Return one judged answer to each prompt, on all ranks. Call it inside `ready`.

        Args:
            places: of the prompts' sequences in the step; None counts up from 0. Step and place make an answer's seed,
                so that every engine samples the same answer.
            early: takes the sequences of this rank as they end.
            max_new_tokens: of a turn; None is the responder's.
        """
        places = range(len(prompts)) if places is None else places

        def answer(mine: list[int]) -> list[tuple[Sample, float | None]]:
            own = [prompts[index] for index in mine]
            seeds = [self.responder.seed_of(step=step, sequence=places[index]) for index in mine]

            def end(index: int, sample: Sample) -> None:
                assert early is not None
                early.add(places[mine[index]], Rollout(own[index], sample))

            on_end, limit = None if early is None else end, max_new_tokens
            rollouts = self.responder.respond(self.sampler, own, seeds=seeds, on_end=on_end, max_new_tokens=limit)
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


TeacherHeadReader = Callable[[int, Teacher], object]
"""Takes a teacher's index and the awake teacher. A collective."""


@dataclass(frozen=True)
class PendingScores:
    """The sequences of a step that are being scored by ranks that do nothing else."""

    rollouts: Sequence[Rollout]
    plans: Sequence[BatchPlan]
    slots: Sequence[int] | None
    waits: Mapping[int, tuple[list[int], Callable[[], list[TeacherScores]]]]
    """By teacher: places in `rollouts`, and what waits for their scores."""


@dataclass
class ScoringWorker:
    """Score the sequences that each rank trains on with their teachers. Building it is a collective."""

    teachers: Sequence[Teacher]
    """In the config's order (`Target.teacher`), in which they score."""
    planner: Planner
    stages: Stages
    merged_eos_ids: tuple[int, ...] = ()
    hidden: bool = False
    """Whether the teachers return their hidden states instead of their top-k."""
    heads: TeacherHeadReader | None = None
    """Reads the head of a teacher whose weights move, each time that it has scored."""
    translations: Mapping[int, Translation] = field(default_factory=dict)
    """By index of the teachers with a tokenizer of their own."""
    begins_early: bool = False
    """Whether a sequence is scored when it ends, while others are still sampled (`rollout.score_while_sampling`)."""
    shares: list[EngineShare] = field(init=False)
    """By teacher."""

    def __post_init__(self) -> None:
        parallel = self.stages.parallel
        self.shares = [EngineShare.near_training(teacher.num_ranks, parallel) for teacher in self.teachers]

    def begin(self) -> EarlyScores | None:
        """Return what scores a step's sequences as they end; None if they are scored when all have ended."""
        if not self.begins_early:
            return None
        batch_tokens = BATCH_TOKENS[self.stages.parallel.device.type]
        return EarlyScores(
            self.teachers,
            batch_tokens=batch_tokens,
            merged_eos_ids=self.merged_eos_ids,
            hidden=self.hidden,
            translations=self.translations,
        )

    def score(
        self,
        rollouts: Sequence[Rollout],
        *,
        stage: str = "score",
        early: EarlyScores | None = None,
        slots: Sequence[int] | None = None,
    ) -> ScoredBatch:
        """Plan the micro-batches of a step's sequences, and score this rank's.

        Neighbouring ranks partition their sequences over their engines and exchange the scores.

        Args:
            stage: the stage that the time counts for.
            early: has taken the student's answers already.
            slots: see `Planner.plan`.
        """
        plans = self.planner.plan(rollouts, slots)
        left = [early is None or rollout.sample.source != "student" for rollout in rollouts]
        scored: dict[Place, TeacherScores] = {}
        for index, teacher in enumerate(self.teachers):
            wanted = {
                place: target
                for place, rollout in enumerate(rollouts)
                for target in rollout.prompt.targets
                if left[place] and target.teacher == index
            }
            if wanted:
                with self.stages.awake(teacher), self.stages(stage):
                    scored |= self._score_with(index, rollouts, wanted, plans)
                    if self.hidden and self.heads is not None:
                        self.heads(index, teacher)
        if early is not None:
            with self.stages(stage):
                ranks = self.stages.parallel.data_ranks
                needed = [_places(rollouts, (p for plan in plans for p in plan.members_of(rank))) for rank in ranks]
                found: dict[Place, TeacherScores] = {}
                with self.stages.unless_lost():
                    found = early.collect()
                scored |= deliver(found, needed)
        self.stages.check_stop()
        return replace(self._batch(rollouts, plans, scored), slots=slots)

    @property
    def can_begin(self) -> bool:
        """Whether all teachers score on ranks of their own, each of which scores for some ranks alone."""
        apart = all(teacher.works_apart for teacher in self.teachers)
        return apart and all(share.num_engines == 1 for share in self.shares)

    def begin_step(self, rollouts: Sequence[Rollout], *, slots: Sequence[int] | None = None) -> PendingScores:
        """Plan the micro-batches of a step's sequences, and let the teachers score this rank's. Not a collective.

        Args:
            slots: see `Planner.plan`.
        """
        plans = self.planner.plan(rollouts, slots)
        mine, waits = self.planner.local_places(plans), {}
        for index in range(len(self.teachers)):
            requests = {place: t for place in mine for t in rollouts[place].prompt.targets if t.teacher == index}
            if requests:
                own = [(rollouts[place], target) for place, target in requests.items()]
                waits[index] = list(requests), self._submit(index, own)
        return PendingScores(rollouts, plans, slots, waits)

    def finish_step(self, pending: PendingScores) -> ScoredBatch:
        """Wait for the scores that `begin_step` asked for. A collective."""
        scored: dict[Place, TeacherScores] = {}
        with self.stages("score"), self.stages.unless_lost():
            for index, (places, wait) in pending.waits.items():
                scored |= {(place, index): scores for place, scores in zip(places, wait(), strict=True)}
        self.stages.check_stop()
        return replace(self._batch(pending.rollouts, pending.plans, scored), slots=pending.slots)

    def _score_with(
        self, index: int, rollouts: Sequence[Rollout], wanted: Mapping[int, Target], plans: Sequence[BatchPlan]
    ) -> dict[Place, TeacherScores]:
        """Score the sequences of this rank's engine's neighbourhood with one teacher. A collective.

        Args:
            wanted: the sequences of the whole step that the teacher scores, by place.
        """
        share = self.shares[index]
        members = [place for plan in plans for rank in share.data_ranks for place in plan.members_of(rank)]
        places = [place for place in members if place in wanted]

        def score(mine: list[int]) -> list[TeacherScores]:
            own = [(rollouts[places[one]], wanted[places[one]]) for one in mine]
            with self.stages.unless_lost():
                return self._submit(index, own)()
            return [TeacherScores.empty() for _ in mine]

        costs = [len(rollouts[place].ids_for(wanted[place])) for place in places]
        found = share.map(score, costs) if places else {}
        return {(places[one], index): scores for one, scores in found.items()}

    def _submit(self, index: int, requests: Sequence[Request]) -> Callable[[], list[TeacherScores]]:
        """Begin to score answers with a teacher; return what waits for the scores."""
        return submit(
            requests,
            self.teachers[index],
            merged_eos_ids=self.merged_eos_ids,
            hidden=self.hidden,
            translation=self.translations.get(index),
        )

    def _batch(
        self, rollouts: Sequence[Rollout], plans: Sequence[BatchPlan], scored: Mapping[Place, TeacherScores]
    ) -> ScoredBatch:
        """Return this rank's part of the step, with one distribution for each token. A collective if teachers mix."""
        scores, uncertain = {}, torch.zeros(2, dtype=torch.float64)
        for place in self.planner.local_places(plans):
            targets = rollouts[place].prompt.targets
            parts, weights = [scored[place, one.teacher] for one in targets], [one.weight for one in targets]
            scores[place] = parts[0] if len(parts) == 1 else mix(parts, weights)
            if len(parts) > 1:
                mass_R = uncertain_mass(parts, weights)
                uncertain += torch.tensor([float(mass_R.sum()), len(mass_R)], dtype=torch.float64)
        metrics = {}
        if any(len(rollout.prompt.targets) > 1 for rollout in rollouts):
            parallel = self.stages.parallel
            total, number = parallel.all_sum(uncertain.float().to(parallel.device)).tolist()
            metrics["train/mixture_uncertainty"] = total / max(number, 1)
        return ScoredBatch(rollouts, plans, scores, metrics=metrics)

    def sample(self, prompts: Sequence[Prompt], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        """Return the answer of each prompt's main teacher to its version of the prompt, on all ranks."""
        answers: dict[int, Sample] = {}
        for index in range(len(self.teachers)):
            mine = {place: one.main_target for place, one in enumerate(prompts) if one.main_target.teacher == index}
            if mine:
                answers |= self._sample_with(index, prompts, mine, seeds=seeds, sampling=sampling)
        self.stages.check_stop()
        return [answers[place] for place in range(len(prompts))]

    def _sample_with(
        self,
        index: int,
        prompts: Sequence[Prompt],
        wanted: Mapping[int, Target],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
    ) -> dict[int, Sample]:
        places, ids = list(wanted), [prompts[place].ids_for(target) for place, target in wanted.items()]
        teacher, translation, longest = self.teachers[index], self.translations.get(index), sampling.max_new_tokens
        if translation is not None:
            sampling = translation.sampling(sampling)

        def answer(mine: list[int]) -> list[Sample]:
            own_seeds = [seeds[places[one]] for one in mine]
            with self.stages.unless_lost():
                return teacher.sample([ids[one] for one in mine], seeds=own_seeds, sampling=sampling)
            return [Sample([], None, "length") for _ in mine]

        engines = EngineShare.of_all_ranks(teacher.num_ranks, self.stages.parallel)
        with self.stages.awake(teacher), self.stages("sample"):
            sampled = engines.map(answer, [len(one) for one in ids])
        if translation is not None:
            read = partial(translation.sample, max_new_tokens=longest)
            sampled = {one: read(sample) for one, sample in sampled.items()}
        return {places[one]: sample for one, sample in sampled.items()}


def _places(rollouts: Sequence[Rollout], places: Iterable[int]) -> list[Place]:
    """Return the places of all scores of these sequences."""
    return [(place, target.teacher) for place in places for target in rollouts[place].prompt.targets]
