"""Prompts become rollouts: the student samples, the teacher scores, the verifier judges."""

from __future__ import annotations

from collections.abc import Sequence

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.engines.settings import SamplingSettings
from distill_cli.losses.merged_eos import merge_topk
from distill_cli.rollout.turns import Turns, sample_turns
from distill_cli.types import Prompt, Rollout


def sequence_seed(seed: int, *, step: int, sequence: int) -> int:
    """The seed of one answer: another for each, the same on any number of ranks."""
    return ((seed * 1_000_003 + step) * 1_000_003 + sequence) % 2**63


def sample_rollouts(
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int],
    sampler: Sampler,
    sampling: SamplingSettings,
    turns: Turns | None = None,
) -> list[Rollout]:
    """One answer to each prompt, in several turns where there is an environment."""
    if turns is not None:
        return sample_turns(prompts, seeds=seeds, sampler=sampler, sampling=sampling, turns=turns)
    samples = sampler.sample([prompt.token_ids for prompt in prompts], seeds=seeds, sampling=sampling)
    return [Rollout(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]


def score_rollouts(rollouts: Sequence[Rollout], *, scorer: Scorer, one_class: Sequence[int] = ()) -> None:
    """Fills in the teacher's scores of the student's answers; the prompts before them may be the teacher's own.

    The tokens of `one_class` are taken for one (`model.eos_map`).
    """
    assert all(len(one.sample.logp) == len(one.sample.token_ids) for one in rollouts), "sampled with logp=False"
    scores = scorer.score(
        [rollout.teacher_token_ids for rollout in rollouts],
        response_starts=[len(rollout.teacher_prompt_ids) for rollout in rollouts],
    )
    for rollout, score in zip(rollouts, scores, strict=True):
        rollout.scores = merge_topk(score, sampled_ids=rollout.sample.token_ids, one_class=one_class)


def judge_rollouts(rollouts: Sequence[Rollout], *, verify: IsolatedVerifier, decode) -> None:
    """Fills in the reward where the example has an answer and no environment gave one; `decode` makes text of ids.

    Of several turns the last is what is judged.
    """
    open_ones = [one for one in rollouts if one.prompt.example.answer is not None and one.reward is None]
    scores = verify([(decode(one.sample.last_turn_ids), one.prompt.example.answer) for one in open_ones])
    for rollout, score in zip(open_ones, scores, strict=True):
        rollout.reward = score
