"""Pools of runs that differ only in their seed, against values worked out by hand or from tables."""

from pathlib import Path

import pytest

from distill_cli.metrics import METRICS, Metric
from distill_cli.report.pools import Mean, mean_of, pools, rank, student_t
from distill_cli.report.read import RunResult

KL, ACCURACY, LOSS, ENTROPY, TOKENS = (
    next(metric for metric in METRICS if metric.name == name)
    for name in ("train/kl_forward", "val/accuracy", "train/loss", "train/entropy", "train/response_tokens")
)


def result(
    settings: dict[str, str], *, kl: float = 0.0, state: str = "finished", sweep: str | None = "s", step: int = 5
) -> RunResult:
    final = {KL.name: kl, "perf/tokens_per_s": 1000 * kl}
    name = "_".join(settings.values()) or "run"
    return RunResult(Path(sweep or "runs") / name, settings, state, step, final, Path(sweep) if sweep else None)


def seeds(loss: str, *kls: float, **fields: str) -> list[RunResult]:
    return [result({"loss": loss, "train.seed": str(seed)}, kl=kl, **fields) for seed, kl in enumerate(kls)]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799), (100_000, 1.96)],
)
def test_student_t_is_the_tables(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, abs=1e-4)


def test_student_t_by_formula() -> None:
    """One and two degrees of freedom have closed forms: tan(0.95 pi / 2), and 0.95 sqrt(2 / (1 - 0.95^2))."""
    assert student_t(1) == pytest.approx(12.706204736174698, rel=1e-12)
    assert student_t(2) == pytest.approx(0.95 * (2 / (1 - 0.95**2)) ** 0.5, rel=1e-12)


def test_intervals_by_hand() -> None:
    assert mean_of([0.3]) == Mean(0.3, None)
    three = mean_of([1.0, 2.0, 3.0])  # s = 1
    assert three.value == 2.0
    assert three.half == pytest.approx(4.3026527 / 3**0.5)
    two = mean_of([0.9, 1.0])  # s / sqrt(2) = 0.05
    assert two.value == pytest.approx(0.95)
    assert two.half == pytest.approx(12.7062047 * 0.05)
    assert mean_of([2.0, 2.0, 2.0]) == Mean(2.0, 0.0)


@pytest.mark.parametrize(
    ("mean", "metric", "text"),
    [
        (Mean(0.0123456, None), KL, "0.01235"),
        (Mean(0.0123456, 0.000789), KL, "0.01235 ± 0.00079"),
        (Mean(0.0123456, 0.00789), KL, "0.0123 ± 0.0079"),
        (Mean(12.3456, 130.0), KL, "12 ± 130"),
        (Mean(0.5, 0.0), KL, "0.5 ± 0"),
        (Mean(0.91234, 0.0234), ACCURACY, "91.2% ± 2.3%"),
        (Mean(36872.0, 123.4), TOKENS, "36,872 ± 123"),
    ],
)
def test_means_have_the_digits_of_their_interval(mean: Mean, metric: Metric, text: str) -> None:
    assert mean.shown(metric) == text


def test_intervals_overlap() -> None:
    assert Mean(1.0, 0.2).overlaps(Mean(1.5, 0.3))
    assert not Mean(1.0, 0.2).overlaps(Mean(1.5, 0.2))
    assert Mean(1.0, None).overlaps(Mean(1.5, 0.5))
    assert not Mean(1.0, None).overlaps(Mean(1.0, None))  # single runs: nothing is known


def test_runs_that_differ_in_the_seed_are_pooled() -> None:
    forward, reverse = pools([*seeds("forward", 1.0, 2.0, 3.0), *seeds("reverse", 5.0)])
    assert (forward.settings, forward.name, len(forward.counted)) == ({"loss": "forward"}, "loss=forward", 3)
    assert forward.mean(KL.name) == mean_of([1.0, 2.0, 3.0])
    assert forward.mean(ACCURACY.name) is None
    assert reverse.mean(KL.name) == Mean(5.0, None)


def test_nothing_to_pool_leaves_runs_alone() -> None:
    alone = [result({"loss": "a", "train.seed": "1"}), result({"loss": "b", "train.seed": "2"}), result({"loss": "c"})]
    assert [(pool.results, pool.settings) for pool in pools(alone)] == [([one], one.settings) for one in alone]


def test_other_runs_are_no_seeds() -> None:
    """Those of another sweep may differ in what was not swept, and the same seed again is no other draw."""
    one, other = seeds("a", 1.0, 2.0), seeds("a", 3.0, 4.0, sweep="t")
    assert [len(pool.results) for pool in pools([*one, *other])] == [2, 2]
    again = result({"loss": "a", "train.seed": "1"}, kl=2.0)
    assert [len(pool.results) for pool in pools([*one, again])] == [2, 1]
    unseeded = [result({"loss": "a"}), result({"loss": "a"})]
    assert [len(pool.results) for pool in pools([*one, *unseeded[:1]])] == [2, 1]
    named = seeds("a", 1.0, 2.0, sweep=None)
    assert [len(pool.results) for pool in pools(named)] == [2]


def test_state_and_step_of_a_pool() -> None:
    runs = [*seeds("a", 1.0, 2.0), result({"loss": "a", "train.seed": "9"}, kl=7.0, state="failed", step=2)]
    (pool,) = pools(runs)
    assert (pool.state, pool.is_finished, pool.step) == ("2 finished, 1 failed", False, "5")
    assert pool.mean(KL.name) == mean_of([1.0, 2.0])
    (pool,) = pools([result({"train.seed": str(seed)}, kl=seed, state="running", step=seed) for seed in (3, 4)])
    assert (pool.state, pool.step, pool.name) == ("running", "3-4", "2 seeds")
    assert pool.mean(KL.name) == mean_of([3.0, 4.0])


def test_equal_runs_give_no_interval() -> None:
    runs = seeds("a", 1.0, 1.0, 1.0)
    runs[0].final["perf/tokens_per_s"] = 7.0
    (pool,) = pools(runs)
    assert pool.is_repeated
    assert pool.mean(KL.name) == Mean(1.0, None)
    assert not pools(seeds("a", 1.0, 1.0, 1.0 + 1e-12))[0].is_repeated


def test_the_best_and_what_may_be_as_good() -> None:
    runs = [*seeds("a", 1.0, 1.1, 1.2), *seeds("b", 1.1, 1.2, 1.3), *seeds("c", 9.0, 9.1, 9.2)]
    unfinished = seeds("d", 0.1, 0.2, state="running")
    among = pools([*runs, *unfinished])  # each of a, b and c is ± 0.248
    ranking = rank(among, KL)
    assert (ranking.best, ranking.near) == (among[0], [among[1]])
    for metric in (ENTROPY, ACCURACY):  # neither direction is better; nobody validated
        ranking = rank(among, metric)
        assert (ranking.best, ranking.near) == (None, [])


def test_different_losses_have_no_best() -> None:
    for key, is_comparable in (("loss", False), ("loss.topk", False), ("train.lr", True)):
        runs = [RunResult(Path(value), {key: value}, "finished", 5, {LOSS.name: float(value)}) for value in "12"]
        assert (rank(pools(runs), LOSS).best is not None) == is_comparable
