"""A search: Optuna draws the runs of a sweep from ranges, a batch at a time, by what earlier runs reached.

A batch follows from `search.seed` and the trials in the sweep's folder alone; nothing else is kept between batches. So
the same command makes the same trials, and an interrupted search resumes as if it had not been interrupted.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from hydra.core.override_parser.types import Glob, Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from rich.markup import escape

from distill_cli.config.compose import Job, check_overrides, compose
from distill_cli.config.derived import validates
from distill_cli.config.execution_schema import ClusterConfig, SearchSampler
from distill_cli.config.overrides import sweeps, takes_fractions
from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.run_dir import Element, RunDir, SweepDir, write_json
from distill_cli.jobs.prepare import print_warnings, resolve_jobs
from distill_cli.jobs.sweep import add_runs, carry_out_runs, check_sweep, conclude, discard_if_refused, new_sweep
from distill_cli.report.read import last_values
from distill_cli.terminal.console import Console

FIXED = ("search", "checkpoint", "cluster", "run", "tracker")
"""Sections that all trials share: what they are compared by, where they run, and where they are recorded."""


@dataclass(frozen=True)
class Search:
    """A search as typed."""

    overrides: list[str]
    command: list[str]
    """The whole command line; trials are recorded with it."""
    space: dict[str, BaseDistribution]
    """What each key with a range or several values is drawn from; a key as typed, with its + if it has one."""
    config: Config
    """Composed with the first value of each; the sections in `FIXED` are those of every trial."""
    warned: set[str] = field(default_factory=set)
    """Warnings that were printed: each is printed once."""


def search(overrides: Sequence[str], flags: Sequence[str], *, command: Sequence[str], console: Console) -> int:
    """Draw, check and carry out `search.trials` runs; return the exit status.

    Raises:
        ConfigError: the search or one of its first trials is wrong, and nothing was started; or a later trial is.
    """
    asked = read_search(overrides, flags, command=command)
    sweep = new_sweep(asked.config)
    elements = next_batch(asked, sweep, console=console)
    try:
        with RunDir(sweep.path).lock():
            return carry_out_search(asked, sweep, elements, console=console)
    except ConfigError:
        discard_if_refused(sweep, elements, asked.config)
        raise


def carry_out_search(asked: Search, sweep: SweepDir, elements: Sequence[Element], *, console: Console) -> int:
    """Carry out prepared trials, then draw and carry out the remaining ones; return the exit status.

    The sweep's folder must be locked.
    """
    failed, best = 0, None
    while elements := elements or next_batch(asked, sweep, console=console):
        config = load_config(RunDir(sweep.path / elements[0].folder).config)  # as the checks have settled it
        failed += carry_out_runs(sweep, elements, config, console=console)
        best, elements = write_results(asked, sweep), []
    found = f"{best['value']:.4g} with {' '.join(best['overrides'])}" if best else "none: no trial reached a value"
    console.print(f"best     {escape(found)}")
    return conclude(sweep, failed, console=console)


def read_search(overrides: Sequence[str], flags: Sequence[str], *, command: Sequence[str] = ()) -> Search:
    """Parse what was typed, without drawing or checking any trial.

    Raises:
        ConfigError: an override is wrong, nothing is searched, a range cannot be drawn from, or trials would reach
            no value.
    """
    check_overrides(overrides, flags)
    if "--multirun" not in flags:
        raise ConfigError("search.trials: a search is a sweep; add -m")
    searched = sweeps(overrides)
    if not searched:
        raise ConfigError("search.trials: nothing is searched; add a range, such as 'train.lr=interval(1e-5,1e-3)'")
    for override in searched:
        if override.key_or_group.partition(".")[0] in FIXED:
            raise ConfigError(f"{override.input_line}: trials of a search share this section; give one value")
    space = {override.get_key_element(): distribution(override) for override in searched}
    first = {
        key: kind.choices[0] if isinstance(kind, CategoricalDistribution) else kind.low for key, kind in space.items()
    }
    (job,) = compose(_with_values(overrides, first))
    config, metric = job.config, job.config.checkpoint.metric
    if config.search.trials < 1:
        raise ConfigError(f"search.trials={config.search.trials}: must be at least 1")
    if metric.startswith("val/") and not (validates(config) and (config.eval.at_end or config.eval.period)):
        raise ConfigError(
            f"checkpoint.metric={metric}: decides the search, and nothing validates; set eval.at_end=true, or choose "
            "another metric, such as train/kl_forward with checkpoint.higher_is_better=false"
        )
    return Search(list(overrides), list(command), space, config)


def distribution(override: Override) -> BaseDistribution:
    """Return what Optuna draws a key's values from: whole numbers if its bounds are, or if the key takes no others.

    Raises:
        ConfigError: Optuna cannot draw from the range.
    """
    values, step = override.value(), None
    try:
        if isinstance(values, Glob):
            raise ValueError("name the choices, separated by commas")
        if values.tags - {"log"} or (values.tags and override.is_choice_sweep()):
            raise ValueError("the one tag is log, of an interval or a range")
        if override.is_choice_sweep():
            return CategoricalDistribution(sorted(set(override.sweep_string_iterator())))  # sorted after shuffle()
        if override.is_range_sweep():
            bounds, step = sorted(round(value, 12) for value in values.range()), abs(values.step)
        else:
            bounds = [values.start, values.end]
        if not bounds or not all(map(math.isfinite, bounds)):
            raise ValueError("the range is empty or has no end")
        low, high = bounds[0], bounds[-1]
        if (isinstance(low, int) and isinstance(high, int)) or not takes_fractions(override.key_or_group):
            return IntDistribution(int(low), int(high), log="log" in values.tags, step=step or 1)
        return FloatDistribution(low, high, log="log" in values.tags, step=step)
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: cannot be searched: {error}") from error


def next_batch(asked: Search, sweep: SweepDir, *, console: Console) -> list[Element]:
    """Draw the next trials and make their folders; return none once there are `search.trials`.

    Raises:
        ConfigError: a trial is wrong; no folder was made for the batch.
    """
    known = len(sweep.elements()) if sweep.file.is_file() else 0
    jobs = [trial_job(asked, drawn) for drawn in draw(asked, sweep)]
    if not jobs:
        return []
    jobs, resolved = resolve_jobs(jobs, is_new=not known)
    check_sweep(jobs)
    print_warnings(jobs, resolved, console=console, printed=asked.warned)
    console.print(f"trials   {known + 1} to {known + len(jobs)} of {asked.config.search.trials}")
    words = [word.partition("=") for word in asked.overrides]
    space = {key.lstrip("+"): text for key, _, text in words if key in asked.space}
    return add_runs(sweep, jobs, resolved, command=asked.command, space=space)


def draw(asked: Search, sweep: SweepDir) -> list[dict[str, Any]]:
    """Return the values of each trial of the next batch, by key; fractions have six digits."""
    study = study_of(asked, sweep)
    batch = min(trials_at_a_time(asked.config.cluster), asked.config.search.trials - len(study.trials))
    drawn = [study.ask(asked.space).params for _ in range(batch)]
    for key, kind in asked.space.items():
        if isinstance(kind, FloatDistribution):
            for values in drawn:
                values[key] = min(max(float(f"{values[key]:.6g}"), kind.low), kind.high)
    return drawn


def study_of(asked: Search, sweep: SweepDir) -> optuna.Study:
    """Return a study that was told the sweep's trials, in order; one that reached no value counts as failed."""
    elements = sweep.elements() if sweep.file.is_file() else []
    seed = random.Random(f"{asked.config.search.seed} {len(elements)}").getrandbits(32)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        samplers = {
            SearchSampler.tpe: optuna.samplers.TPESampler(seed=seed, constant_liar=True),  # spreads a batch
            SearchSampler.random: optuna.samplers.RandomSampler(seed=seed),
        }
    direction = "maximize" if asked.config.checkpoint.keeps_highest else "minimize"
    study = optuna.create_study(sampler=samplers[asked.config.search.sampler], direction=direction)
    numbers = {FloatDistribution: float, IntDistribution: int}
    for element in elements:
        drawn = dict(override.split("=", 1) for override in element.overrides)
        params = {key: numbers.get(type(kind), str)(drawn[key]) for key, kind in asked.space.items()}
        value = reached(RunDir(sweep.path / element.folder), asked.config.checkpoint.metric)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=asked.space))
    return study


def trial_job(asked: Search, drawn: Mapping[str, Any]) -> Job:
    """Compose a trial: a drawn value in place of each range, and without search.trials."""
    words = [word for word in asked.overrides if not word.lstrip("+").startswith("search.trials=")]
    (job,) = compose(_with_values(words, drawn))
    overrides = [override for override in job.overrides if not override.startswith("search.")]
    return replace(job, overrides=overrides, swept=[f"{key}={value}" for key, value in drawn.items()])


def trials_at_a_time(cluster: ClusterConfig) -> int:
    return cluster.parallel_jobs or 1


def write_results(asked: Search, sweep: SweepDir) -> dict[str, Any] | None:
    """Write search.json: the metric, each trial with the value that it reached, and the best, which is returned."""
    pairs = zip(sweep.elements(), study_of(asked, sweep).trials, strict=True)
    trials = [{"run": run.folder, "overrides": run.overrides, "value": trial.value} for run, trial in pairs]
    metric, is_higher_better = asked.config.checkpoint.metric, asked.config.checkpoint.keeps_highest
    finished = [trial for trial in trials if trial["value"] is not None]
    best = (max if is_higher_better else min)(finished, key=lambda trial: trial["value"], default=None)
    content = {"metric": metric, "higher_is_better": is_higher_better, "best": best, "trials": trials}
    write_json(sweep.path / "search.json", content)
    return best


def reached(run: RunDir, metric: str) -> float | None:
    """Return the last value of a metric; None if the run has not finished, or the value is missing or not finite."""
    outcome = read_outcome(run)
    if outcome is None or not outcome.is_finished:
        return None
    value = last_values(run.metrics, [metric]).get(metric, math.nan)
    return value if math.isfinite(value) else None


def _with_values(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the overrides with these values in place of ranges."""
    keys = [word.partition("=")[0] for word in overrides]
    return [f"{key}={values[key]}" if key in values else word for key, word in zip(keys, overrides, strict=True)]
