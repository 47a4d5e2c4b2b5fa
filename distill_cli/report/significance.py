"""Estimates from a model's answers to a benchmark, with intervals and p-values. No torch.

The unit of resampling is the problem, never a single answer, since answers to one problem are correlated. Every draw
has a fixed seed: the same answers give the same numbers.

Shape letters: P problems, S answers to each, D bootstrap or permutation draws.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RIGHT = 0.5
"""A reward above it is a right answer."""
SEED = 0
NUM_BOOTSTRAP = 10_000
NUM_PERMUTATIONS = 100_000
MAX_EXACT = 16
"""Up to so many problems that differ, every assignment of signs is enumerated."""
CHUNK = 1_000
"""Draws in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One model's accuracy minus another's, on the same problems."""

    estimate: Estimate
    p_value: float
    """Two-sided p-value of a paired sign-flip permutation test."""


def pass_at(num_draws: int, *, num_right: int, num_samples: int) -> float:
    """Return the chance that one of `num_draws` answers, drawn without replacement, is right: unbiased for pass@k.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    return 1.0 - math.comb(num_samples - num_right, num_draws) / math.comb(num_samples, num_draws)


def majority(votes: Sequence[Hashable | None], rewards: Sequence[float]) -> float:
    """Return the reward of the most frequent final answer to a problem.

    None is no vote. Tied answers are averaged; without any vote the reward is 0.
    """
    rewards_of: dict[Hashable, list[float]] = defaultdict(list)
    for vote, reward in zip(votes, rewards, strict=True):
        if vote is not None:
            rewards_of[vote].append(reward)
    if not rewards_of:
        return 0.0
    most = max(map(len, rewards_of.values()))
    winners = [rewards for rewards in rewards_of.values() if len(rewards) == most]
    return sum(sum(rewards) / len(rewards) for rewards in winners) / len(winners)


def estimates(values_of: Sequence[Sequence[float]]) -> list[Estimate]:
    """Return the mean and interval of each of several values of the same problems, with common draws."""
    arrays = [np.asarray(values_P, dtype=float) for values_P in values_of]
    means_of = [[values_P[drawn_DP].mean(1) for values_P in arrays] for drawn_DP in draws(len(arrays[0]))]
    return [
        Estimate(float(values_P.mean()), *percentiles(np.concatenate(means_D)))
        for values_P, means_D in zip(arrays, zip(*means_of, strict=True), strict=True)
    ]


def difference(ours_P: Sequence[float], theirs_P: Sequence[float]) -> Difference:
    """Return ours minus theirs, problem by problem, with a two-sided p-value by sign flips.

    If the models are equal, each problem's difference has either sign with equal chance. The p-value is exact for up to
    `MAX_EXACT` problems that differ, and if all differ by the same size (one answer per problem: McNemar's exact test);
    else it comes from `NUM_PERMUTATIONS` draws and is at least one in as many.
    """
    differences_P = np.asarray(ours_P, dtype=float) - np.asarray(theirs_P, dtype=float)
    return Difference(estimates([differences_P])[0], sign_flip_p(differences_P[differences_P != 0]))


def sign_flip_p(differences_P: np.ndarray) -> float:
    """Return the share of sign assignments whose sum is at least as far from 0; no difference may be 0."""
    number = len(differences_P)
    sizes_P, observed = np.abs(differences_P), abs(differences_P.sum())
    at_least = observed - 1e-9 * max(observed, 1.0)  # rounding depends on the order of the sum
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
    """Return the share of the way from before to the teacher; None if there was no gap to close."""
    scores_3P = np.asarray([before_P, after_P, teacher_P], dtype=float)
    before, after, teacher = scores_3P.mean(1)
    if teacher <= before:
        return None
    means_3D = np.concatenate([scores_3P[:, drawn_DP].mean(2) for drawn_DP in draws(scores_3P.shape[1])], axis=1)
    before_D, after_D, teacher_D = means_3D[:, means_3D[2] > means_3D[0]]
    shares_D = (after_D - before_D) / (teacher_D - before_D)
    return Estimate(float((after - before) / (teacher - before)), *percentiles(shares_D))


def draws(number: int) -> Iterator[np.ndarray]:
    """Yield int64 [CHUNK, P]: problems drawn with replacement."""
    rng = np.random.default_rng(SEED)
    for _ in range(NUM_BOOTSTRAP // CHUNK):
        yield rng.integers(0, number, size=(CHUNK, number))


def percentiles(values_D: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95% interval."""
    low, high = np.percentile(values_D, [2.5, 97.5])
    return float(low), float(high)
