"""What answers to a benchmark say about a model, and how sure that is. No torch.

The unit of chance is the problem: intervals and p-values draw problems anew, never single answers, since answers to one
problem are alike. Every draw has a fixed seed: the same answers give the same numbers.

Shape letters: P problems, S answers to each, D bootstrap or permutation draws.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RIGHT = 0.5
"""A reward above it is a right answer, where answers are right or wrong."""
SEED = 0
NUM_BOOTSTRAP = 10_000
NUM_PERMUTATIONS = 100_000
MAX_EXACT = 16
"""Problems that differ, up to which every assignment of signs is gone through."""
CHUNK = 1_000
"""Draws that are in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One model's accuracy less another's, on the same problems."""

    estimate: Estimate
    p_value: float
    """Of a paired test that signs are drawn for: how often a difference as large comes of two equal models."""


def pass_at(num_draws: int, *, num_right: int, num_samples: int) -> float:
    """The chance that one of `num_draws` answers, drawn without putting back, is right: unbiased for pass@k.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    return 1.0 - math.comb(num_samples - num_right, num_draws) / math.comb(num_samples, num_draws)


def majority(votes: Sequence[Hashable | None], rewards: Sequence[float]) -> float:
    """The reward of the final answer that most samples of a problem give.

    None is no answer and no vote. Answers that share the most votes share the reward; without any vote it is 0.
    """
    rewards_of = defaultdict(list)
    for vote, reward in zip(votes, rewards, strict=True):
        if vote is not None:
            rewards_of[vote].append(reward)
    if not rewards_of:
        return 0.0
    most = max(map(len, rewards_of.values()))
    winners = [rewards for rewards in rewards_of.values() if len(rewards) == most]
    return sum(sum(rewards) / len(rewards) for rewards in winners) / len(winners)


def estimate(values_P: Sequence[float]) -> Estimate:
    """The mean of one value a problem, and where it lies."""
    return estimates([values_P])[0]


def estimates(values_of: Sequence[Sequence[float]]) -> list[Estimate]:
    """The same of several values of the same problems, which are drawn once for all."""
    values_of = [np.asarray(values_P, dtype=float) for values_P in values_of]
    means_of = [[values_P[drawn_DP].mean(1) for values_P in values_of] for drawn_DP in draws(len(values_of[0]))]
    return [
        Estimate(float(values_P.mean()), *percentiles(np.concatenate(means_D)))
        for values_P, means_D in zip(values_of, zip(*means_of, strict=True), strict=True)
    ]


def difference(ours_P: Sequence[float], theirs_P: Sequence[float]) -> Difference:
    """Ours less theirs, problem by problem, with a two-sided p-value by sign flips.

    Under the hypothesis that the models are equal, each problem's difference could as well have the other sign. With up
    to `MAX_EXACT` problems that differ, or where all that differ do so by as much (one answer a problem: McNemar's
    exact test), the p-value is exact; else it is of `NUM_PERMUTATIONS` draws, and never below one in as many.
    """
    differences_P = np.asarray(ours_P, dtype=float) - np.asarray(theirs_P, dtype=float)
    return Difference(estimate(differences_P), sign_flip_p(differences_P[differences_P != 0]))


def sign_flip_p(differences_P: np.ndarray) -> float:
    """The share of sign assignments whose sum is at least as far from 0. Takes differences that are not 0."""
    number = len(differences_P)
    sizes_P, observed = np.abs(differences_P), abs(differences_P.sum())
    at_least = observed - 1e-9 * max(observed, 1.0)  # sums in another order round differently
    if number == 0:
        return 1.0
    if np.ptp(sizes_P) < 1e-12:
        ups = [up for up in range(number + 1) if abs(2 * up - number) * sizes_P[0] >= at_least]
        return min(1.0, sum(math.comb(number, up) for up in ups) / 2**number)
    if number <= MAX_EXACT:
        signs_DP = np.array(list(itertools.product((-1, 1), repeat=number)))
        return float((np.abs(signs_DP @ sizes_P) >= at_least).mean())
    rng, as_far = np.random.default_rng(SEED), 0
    for _ in range(NUM_PERMUTATIONS // CHUNK):
        signs_DP = rng.integers(0, 2, size=(CHUNK, number), dtype=np.int8) * 2 - 1
        as_far += int((np.abs(signs_DP @ sizes_P) >= at_least).sum())
    return (1 + as_far) / (1 + NUM_PERMUTATIONS)


def gap_closed(before_P: Sequence[float], after_P: Sequence[float], teacher_P: Sequence[float]) -> Estimate | None:
    """The share of the way from before to the teacher; None where there was no gap to close."""
    scores_3P = np.asarray([before_P, after_P, teacher_P], dtype=float)

    def share(before: np.ndarray, after: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        return (after - before) / (teacher - before)

    means_3 = scores_3P.mean(1)
    if means_3[2] <= means_3[0]:
        return None
    means_3D = np.concatenate([scores_3P[:, drawn_DP].mean(2) for drawn_DP in draws(scores_3P.shape[1])], axis=1)
    means_3D = means_3D[:, means_3D[2] > means_3D[0]]
    return Estimate(float(share(*means_3)), *percentiles(share(*means_3D)))


def draws(number: int) -> Iterator[np.ndarray]:
    """int64 [chunk of D, P]: problems drawn with putting back."""
    rng = np.random.default_rng(SEED)
    for _ in range(NUM_BOOTSTRAP // CHUNK):
        yield rng.integers(0, number, size=(CHUNK, number))


def percentiles(values_D: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values_D, [2.5, 97.5])
    return float(low), float(high)
