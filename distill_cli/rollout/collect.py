"""Sample, judge and score sequences on one rank's engine; `workers` partitions them over the engines of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.base import AnsweringEngine, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.losses.merged_eos import merge_topk
from distill_cli.rollout.turns import Turns, sample_turns
from distill_cli.types import Prompt, Rollout, TeacherScores


def sequence_seed(seed: int, *, step: int, sequence: int) -> int:
    """Return the seed of one answer: unique to it, and the same on any number of ranks."""
    return ((seed * 1_000_003 + step) * 1_000_003 + sequence) % 2**63


def sample_rollouts(
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int],
    engine: AnsweringEngine,
    sampling: SamplingSettings,
    turns: Turns | None = None,
) -> list[Rollout]:
    """Sample one answer to each prompt, in several turns if there is an environment."""
    if turns is not None:
        return sample_turns(prompts, seeds=seeds, engine=engine, sampling=sampling, turns=turns)
    samples = engine.sample([prompt.token_ids for prompt in prompts], seeds=seeds, sampling=sampling)
    return [Rollout(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]


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


def judge_rollouts(
    rollouts: Sequence[Rollout], *, verify: IsolatedVerifier, decode: Callable[[list[int]], str]
) -> list[Rollout]:
    """Reward answers to examples that have a reference answer, by their last turn; keep an environment's rewards.

    Args:
        decode: returns the text of token ids.
    """
    pairs = {
        index: (decode(rollout.sample.last_turn_ids), answer)
        for index, rollout in enumerate(rollouts)
        if (answer := rollout.prompt.example.answer) is not None and rollout.reward is None
    }
    rewards = dict(zip(pairs, verify(list(pairs.values())), strict=True))
    return [replace(rollout, reward=rewards.get(index, rollout.reward)) for index, rollout in enumerate(rollouts)]
