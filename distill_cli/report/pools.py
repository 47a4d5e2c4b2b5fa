"""Pool runs that differ only in their seed: means with 95% intervals over the seeds.

A number of one run says nothing about how much chance there is in it. With n seeds, the interval of the mean is
mean ± t x s / sqrt(n): s is the standard deviation over the seeds (of n - 1), t the 97.5% quantile of Student's t
distribution with n - 1 degrees of freedom.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean, stdev

from distill_cli.metrics import Metric
from distill_cli.report.read import RunResult, short_settings

SEED = "train.seed"
NEAR = "≈"
"""Marks what is within the interval of the best."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    half: float | None
    """Half the width of its 95% interval; None without an interval."""

    def overlaps(self, other: "Mean") -> bool:
        """Return whether two intervals have a point in common; False if neither mean has an interval."""
        if self.half is None and other.half is None:
            return False
        return abs(self.value - other.value) <= (self.half or 0.0) + (other.half or 0.0)

    def shown(self, metric: Metric) -> str:
        """Return the mean as tables show it, with ± half of its interval, which has two significant digits."""
        if self.half is None:
            return metric.shown(self.value)
        if metric.number_format or metric.is_share or self.half == 0:
            return f"{metric.shown(self.value)} ± {metric.shown(self.half)}"
        decimals = max(0, 1 - math.floor(math.log10(self.half)))
        return f"{self.value:.{decimals}f} ± {self.half:.{decimals}f}"


@dataclass(frozen=True, eq=False)
class Pool:
    """Runs that differ only in their seed, or a single run."""

    results: Sequence[RunResult]
    settings: dict[str, str]
    """What distinguishes it from the other pools."""

    @property
    def name(self) -> str:
        single = self.results[0].name if len(self.results) == 1 else f"{len(self.results)} seeds"
        return short_settings(self.settings) or single

    @cached_property
    def is_finished(self) -> bool:
        return all(result.state == "finished" for result in self.results)

    @property
    def state(self) -> str:
        """The runs' common state, or how many runs are in each."""
        states = Counter(result.state for result in self.results)
        return next(iter(states)) if len(states) == 1 else ", ".join(f"{n} {state}" for state, n in states.items())

    @property
    def step(self) -> str:
        """The runs' last step; the least and the greatest if it differs."""
        steps = {result.step for result in self.counted}
        return str(*steps) if len(steps) == 1 else f"{min(steps)}-{max(steps)}"

    @cached_property
    def counted(self) -> list[RunResult]:
        """The runs that means are taken over: those that have finished, or all if none has."""
        return [result for result in self.results if result.state == "finished"] or list(self.results)

    @cached_property
    def is_repeated(self) -> bool:
        """Return whether all seeds gave the same values: then the runs do not depend on the seed."""
        learned = [{key: one.final[key] for key in one.final if key[:5] != "perf/"} for one in self.counted]
        return len(learned) > 1 and bool(learned[0]) and all(final == learned[0] for final in learned)

    def mean(self, name: str) -> Mean | None:
        """Return a metric's mean over the seeds that have it; None if none has."""
        values = [result.final[name] for result in self.counted if name in result.final]
        return mean_of(values[:1] if self.is_repeated else values) if values else None


def pools(results: Sequence[RunResult]) -> list[Pool]:
    """Return the runs as pools, in their order. If no run has another's settings but for the seed, each is by itself.

    Only runs of one sweep, or runs that were all named one by one, share a pool: they are known to differ in nothing
    but their settings. Of two runs with the same seed, the second is a pool of its own: it is no other draw.
    """
    by_seed: dict[tuple[Path | None, tuple[tuple[str, str], ...]], dict[str | None, RunResult]] = {}
    for result in results:
        seed, others = result.settings.get(SEED), tuple(one for one in result.settings.items() if one[0] != SEED)
        key = result.sweep, others
        if seed is None or seed in by_seed.get(key, {}):
            key = result.folder, others
        by_seed.setdefault(key, {})[seed] = result
    if len(by_seed) == len(results):
        return [Pool([result], result.settings) for result in results]
    return [Pool(list(runs.values()), dict(others)) for (_, others), runs in by_seed.items()]


def is_pooled(among: Sequence[Pool]) -> bool:
    return any(len(pool.results) > 1 for pool in among)


@dataclass(frozen=True)
class Ranking:
    """Which finished pools are the best by a metric."""

    best: Pool | None
    """The one with the best mean; None if none has finished, the metric has no better direction, or it is the loss and
    its definition differs."""
    near: Sequence[Pool]
    """Those whose intervals overlap that of the best: they may be as good."""


def rank(among: Sequence[Pool], metric: Metric) -> Ranking:
    """Return which pools are the best by a metric."""
    changes_loss = any(key.split(".")[0] == "loss" for pool in among for key in pool.settings)
    means = [(pool, mean) for pool in among if pool.is_finished and (mean := pool.mean(metric.name))]
    if not means or metric.better is None or (metric.name == "train/loss" and changes_loss):
        return Ranking(None, [])
    choose = max if metric.better == "higher" else min
    best, top = choose(means, key=lambda one: one[1].value)
    return Ranking(best, [pool for pool, mean in means if pool is not best and mean.overlaps(top)])


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of one value or more, and its interval if there are several."""
    number = len(values)
    if number == 1:
        return Mean(values[0], None)
    return Mean(fmean(values), student_t(number - 1) * stdev(values) / math.sqrt(number))


@cache
def student_t(degrees: int) -> float:
    """Return the t within whose distance from 0 lie 95% of Student's t distribution."""
    low, high = 0.0, 13.0  # one degree of freedom: 12.706
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _share_within(middle, degrees) < 0.95 else (low, middle)
    return high


def _share_within(t: float, degrees: int) -> float:
    """Return the share of Student's t distribution from -t to t.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", equations 26.7.3 (odd) and 26.7.4 (even).
    """
    angle, is_odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    total, term = 0.0, math.cos(angle) if is_odd else 1.0
    for power in range(is_odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
