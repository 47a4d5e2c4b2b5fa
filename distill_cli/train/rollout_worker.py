"""Both engines of a rank, and what a step asks of them: weights taken, sequences sampled and judged, scores given.

What is asked is shared out over the engines of all ranks, and comes out the same on any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from distill_cli.config.schema import Config, OffPolicy
from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.companion import CompanionScorer
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.engines.settings import SamplingSettings
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.sharing import EngineShare, bring_together, share_out
from distill_cli.rollout.collect import judge_rollouts, sample_rollouts, score_rollouts, sequence_seed
from distill_cli.rollout.off_policy import dataset_sample, foreign, off_policy_places
from distill_cli.rollout.pack import Plans
from distill_cli.rollout.turns import Turns
from distill_cli.student.model import Student
from distill_cli.student.synced_weights import synced_parameters
from distill_cli.types import Prompt, Rollout


@dataclass
class EnginePair:
    """Whoever is asked must be awake, on all ranks."""

    config: Config
    parallel: Parallel
    student: Student
    sampler: Sampler | None
    """None, as the scorer may be, in a replay that asks it nothing."""
    scorer: Scorer | CompanionScorer | None
    sampling: SamplingSettings
    verify: IsolatedVerifier | None
    decode: Callable[[list[int]], str]
    encode_response: Callable[[str], list[int]] | None = None
    """Makes tokens of a dataset's answer, its end included."""
    turns: Turns | None = None
    """How sequences go on after a first turn; None where they do not."""
    samplers: EngineShare | None = field(init=False, default=None)
    """This rank's part in sampling a step's sequences."""
    scorers: EngineShare | None = field(init=False, default=None)
    """This rank's part in scoring what it and its neighbours train on."""

    def __post_init__(self) -> None:
        if self.sampler is not None:
            self.samplers = EngineShare.of_all_ranks(self.sampler.tensor_parallel, self.parallel)
        if self.scorer is not None:
            self.scorers = EngineShare.near_training(self.scorer.tensor_parallel, self.parallel)  # collective

    def close(self) -> None:
        """In the reverse of the order in which they were built. A collective."""
        for engine in (self.sampler, self.scorer):
            if engine is not None:
                engine.close()

    def sync(self, version: int) -> None:
        """The student's weights into the sampler's engine, unless it has them. A collective."""
        if version != self.sampler.version:
            as_adapter = self.config.model.student.lora.syncs_adapter
            self.sampler.sync(synced_parameters(self.student, as_adapter=as_adapter), version=version)
        else:  # what was asked before, a validation perhaps, leaves no trace in what comes
            self.sampler.reset_prefix_cache()

    def sample(self, prompts: Sequence[Prompt], *, step: int) -> list[Rollout]:
        """A step's sequences, sampled and judged, one to each prompt. A collective."""
        settings = self.config.rollout
        if settings.on_policy_fraction == 1:
            return self.answer(prompts, step=step)
        off = off_policy_places(
            len(prompts), on_policy_fraction=settings.on_policy_fraction, seed=self.config.train.seed, step=step
        )
        on = [place for place in range(len(prompts)) if place not in off]
        rollouts = dict(zip(on, self.answer([prompts[place] for place in on], step=step, places=on), strict=True))
        for place in off:
            sample = foreign([], "stop", source="teacher")  # it writes when it is awake
            if settings.off_policy is OffPolicy.dataset:
                limit = settings.max_new_tokens
                sample = dataset_sample(prompts[place], encode=self.encode_response, max_new_tokens=limit)
            rollouts[place] = Rollout(prompts[place], sample)
        return [rollouts[place] for place in range(len(prompts))]

    def answer(self, prompts: Sequence[Prompt], *, step: int, places: Sequence[int] | None = None) -> list[Rollout]:
        """The student's answers, judged: each by one engine, known to all ranks. A collective.

        Whichever engine samples a sequence, it comes out the same: its seed is that of the step and its place in it
        (`places`; None is their order).
        """
        places = range(len(prompts)) if places is None else places
        shares = share_out([len(prompt.token_ids) for prompt in prompts], self.samplers.num_engines)
        mine = shares[self.samplers.index]
        rollouts = sample_rollouts(
            [prompts[number] for number in mine],
            seeds=[sequence_seed(self.config.train.seed, step=step, sequence=places[number]) for number in mine],
            sampler=self.sampler,
            sampling=self.sampling,
            turns=self.turns,
        )
        if self.verify is not None:
            judge_rollouts(rollouts, verify=self.verify, decode=self.decode)
        sampled = bring_together([(rollout.sample, rollout.reward) for rollout in rollouts], shares)
        return [Rollout(prompt, *sampled[number]) for number, prompt in enumerate(prompts)]

    def ask_teacher(self, rollouts: Sequence[Rollout], *, step: int) -> None:
        """Fills in the answers that the teacher is to write. A collective."""
        places = [place for place, rollout in enumerate(rollouts) if rollout.sample.source == "teacher"]
        prompts = [rollouts[place].teacher_prompt_ids for place in places]
        engines = EngineShare.of_all_ranks(self.scorer.tensor_parallel, self.parallel)
        shares = share_out([len(prompt) for prompt in prompts], engines.num_engines)
        mine = shares[engines.index]
        samples = self.scorer.sample(
            [prompts[index] for index in mine],
            seeds=[sequence_seed(self.config.train.seed, step=step, sequence=places[index]) for index in mine],
            sampling=replace(self.sampling, logp=False),
        )
        for index, sample in bring_together(samples, shares).items():
            rollouts[places[index]].sample = foreign(sample.token_ids, sample.finish_reason, source="teacher")

    def score(self, plans: Plans) -> None:
        """Fills in the teacher's scores of what this rank trains on. A collective.

        Neighbouring ranks share their sequences out over their engines, and keep what the others scored.
        """
        rollouts = [
            batch[member]
            for batch, plan in plans
            for data_rank in self.scorers.data_ranks
            for member in plan.members_of(data_rank)
        ]
        shares = share_out([len(rollout.teacher_token_ids) for rollout in rollouts], self.scorers.num_engines)
        mine = [rollouts[index] for index in shares[self.scorers.index]]
        score_rollouts(mine, scorer=self.scorer, one_class=self.student.one_class)
        scored = bring_together([rollout.scores for rollout in mine], shares, group=self.scorers.group)
        for index, scores in scored.items():
            rollouts[index].scores = scores

    def failed(self) -> dict[str, float]:
        """Answers that could not be judged and environments that failed since this was last asked. A collective."""
        counted = {}
        if self.verify is not None:
            counted["rollout/verifier_errors"] = self.verify.failures
        if self.turns is not None:
            counted["rollout/environment_errors"] = self.turns.failures
        if not counted:
            return {}
        own = [float(failures.take() * self.samplers.is_first) for failures in counted.values()]
        totals = self.parallel.sum_of_ranks(torch.tensor(own, device=self.parallel.device)).tolist()
        return dict(zip(counted, totals, strict=True))
