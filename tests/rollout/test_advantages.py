"""Advantages of rewards and penalties, by hand."""

import math

import pytest
import torch

from distill_cli.rollout.advantages import AdvantageSettings, advantages, group_advantages
from distill_cli.types import Example, Prompt, Rollout, Sample


def rollout(prompt: int, logp: list[float], *, reward: float | None = None, source: str = "student") -> Rollout:
    sample = Sample([5] * len(logp), logp if source == "student" else None, "stop", source=source)
    return Rollout(Prompt(prompt, [1, 2], Example("q")), sample, reward=reward)


def test_rewards_are_compared_within_a_prompt() -> None:
    rollouts = [
        *(rollout(0, [-1.0], reward=reward) for reward in (1.0, 0.0, 0.0)),
        *(rollout(1, [-1.0], reward=1.0) for _ in range(2)),  # all the same: nothing to compare
        rollout(2, [-1.0], reward=1.0),  # alone
        rollout(0, [-1.0], reward=1.0, source="teacher"),  # not the student's
        rollout(3, [-1.0]),  # not judged
    ]
    spread = math.sqrt(1 / 3)  # of 1, 0, 0 with n - 1
    assert group_advantages(rollouts) == pytest.approx(
        {0: (2 / 3) / spread, 1: (-1 / 3) / spread, 2: (-1 / 3) / spread, 3: 0.0, 4: 0.0, 5: 0.0}
    )
    found = advantages(rollouts, [1, 6], AdvantageSettings(reward=0.5))  # an update of two sequences
    assert found.keys() == {1, 6}
    assert found[1].tolist() == pytest.approx([-0.5 / 3 / spread])
    assert found[6].tolist() == [0.0]


def test_least_likely_tokens_are_penalised() -> None:
    rollouts = [rollout(0, [-0.1, -3.0, -0.2, -0.3, -0.4]), rollout(1, [-2.0, -0.1, -0.5, -0.6, -0.7])]
    rollouts[1] = Rollout(
        rollouts[1].prompt, Sample([5] * 5, [-9.0, *rollouts[1].sample.logp[1:]], "stop", [False, *[True] * 4])
    )  # the environment's token is never penalised
    found = advantages(rollouts, [0, 1], AdvantageSettings(penalty=0.5, penalty_share=2 / 9))
    size = 0.5 * 9 / 2  # the mean over 9 tokens is then that over the 2
    assert found[0].tolist() == pytest.approx([0, -size, 0, 0, 0])
    assert found[1].tolist() == pytest.approx([0, 0, 0, 0, -size])
    of_teacher = [rollout(0, [-1.0, -2.0], source="teacher")]
    assert advantages(of_teacher, [0], AdvantageSettings(penalty=0.5))[0].equal(torch.zeros(2))
