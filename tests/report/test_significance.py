"""Estimates and tests against known answers."""

import itertools
import math

import numpy as np
import pytest

from distill_cli.report import significance as st


@pytest.mark.parametrize(("num_samples", "num_right"), [(1, 0), (1, 1), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_enumerates_subsets(num_samples: int, num_right: int) -> None:
    answers = [True] * num_right + [False] * (num_samples - num_right)
    for k in range(1, num_samples + 1):
        subsets = list(itertools.combinations(answers, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert st.pass_at(k, num_right=num_right, num_samples=num_samples) == pytest.approx(expected)


def test_majority_ties_and_missing_votes() -> None:
    assert st.majority(["7", "7", "8"], [1, 1, 0]) == 1
    assert st.majority(["7", "8", "8"], [1, 0, 0]) == 0
    assert st.majority(["7", "7", "8", "8"], [1, 1, 0, 0]) == 0.5
    assert st.majority([None, None, "7"], [0, 0, 1]) == 1
    assert st.majority([None, None], [0, 0]) == 0


def test_interval_has_its_coverage() -> None:
    rng = np.random.default_rng(1)
    truth, covered = 0.7, 0
    for _ in range(100):
        (result,) = st.estimates([(rng.random(200) < truth).astype(float)])
        assert result.low <= result.value <= result.high
        covered += result.low <= truth <= result.high
    assert 88 <= covered <= 100


def test_interval_approaches_the_normal_one() -> None:
    values = np.tile([0.0, 0.25, 0.5, 1.0], 250)
    (result,) = st.estimates([values])
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert result.low == pytest.approx(result.value - half, abs=0.1 * half)
    assert result.high == pytest.approx(result.value + half, abs=0.1 * half)
    assert st.estimates([values]) == [result]


def binomial_two_sided(wins: int, losses: int) -> float:
    """McNemar's exact test."""
    number, least = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(number, i) for i in range(least + 1)) / 2**number)


@pytest.mark.parametrize(("wins", "losses"), [(8, 0), (5, 3), (10, 10), (30, 12), (100, 60), (0, 1)])
def test_single_answers_give_mcnemars_test(wins: int, losses: int) -> None:
    ours = [1.0] * wins + [0.0] * losses + [1.0] * 50
    theirs = [0.0] * wins + [1.0] * losses + [1.0] * 50
    assert st.difference(ours, theirs).p_value == pytest.approx(binomial_two_sided(wins, losses))


def test_sign_flips_by_hand() -> None:
    # Sums of +-1 +-2 +-4: all of 1, 3, 5, 7 with both signs, each once; 5 = -1 + 2 + 4 or further: 4 of 8.
    assert st.sign_flip_p(np.array([-1.0, 2.0, 4.0])) == 0.5
    assert st.sign_flip_p(np.array([1.0, 2.0, 4.0])) == 0.25
    assert st.sign_flip_p(np.array([])) == 1.0


def test_drawn_signs_approach_the_normal_limit() -> None:
    rng = np.random.default_rng(2)
    differences = rng.normal(0.15, 1.0, size=300)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert st.sign_flip_p(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.005)


def test_p_values_under_equal_models() -> None:
    rng = np.random.default_rng(3)
    p_values = [st.difference(rng.random(12).round(1), rng.random(12).round(1)).p_value for _ in range(100)]
    assert 0 <= sum(p <= 0.05 for p in p_values) <= 11


def test_paired_difference_is_sharp() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random(300)
    ours, theirs = np.clip(hard + 0.02, 0, 1), hard
    result = st.difference(ours, theirs)
    assert 0.015 < result.estimate.low < result.estimate.high <= 0.02 + 1e-9
    assert result.p_value == pytest.approx(1 / (1 + st.NUM_PERMUTATIONS)) or result.p_value < 1e-9
    assert st.difference(theirs, ours).estimate.value == pytest.approx(-result.estimate.value)


def test_the_gap_closed() -> None:
    before, teacher = [0.0] * 50 + [1.0] * 50, [1.0] * 100
    after = [1.0] * 25 + [0.0] * 25 + [1.0] * 50
    result = st.gap_closed(before, after, teacher)
    assert result.value == 0.5
    assert 0.3 < result.low < 0.5 < result.high < 0.7
    assert st.gap_closed(teacher, after, before) is None
