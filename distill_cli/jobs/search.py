"""Search with Optuna: draw the runs of a sweep from ranges, a batch at a time, given earlier results.

A batch follows from `search.seed` and the trials in the sweep's folder alone; nothing else is kept between batches. So
the same command makes the same trials, and an interrupted search resumes as if it had not been interrupted.
"""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from hydra.core.override_parser.types import Glob, Override
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from rich.markup import escape

from distill_cli.config.compose import Job, check_overrides, compose
from distill_cli.config.derived import validates
from distill_cli.config.execution_schema import SearchSampler
from distill_cli.config.schema import Config
from distill_cli.config.variation import sweeps, takes_fractions
from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.run_dir import RunDir, SweepDir, write_json
from distill_cli.jobs.new_runs import print_warnings, resolve_jobs
from distill_cli.jobs.run_jobs import add_runs, carry_out_runs, check_sweep, conclude, new_sweep, newest
from distill_cli.report.read import last_values
from distill_cli.terminal.console import Console

FIXED = ("search", "checkpoint", "cluster", "run", "tracker")
"""Sections that all trials share: what they are compared by, where they run, and where they are recorded."""
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Search:
    """A search as typed."""

    overrides: list[str]
    command: list[str]
    """The whole command line; trials are recorded with it."""
    space: dict[str, Distribution]
    """Distribution of each key with a range or several values; keys as typed, with their + if they have one."""
    config: Config
    """Composed with the first value of each; the sections in `FIXED` are those of every trial."""
    warned: set[str] = field(default_factory=set)
    """Warnings that were printed: each is printed once."""

    @property
    def num_trials(self) -> int:
        return self.config.search.trials or 0


def search(overrides: Sequence[str], flags: Sequence[str], *, command: Sequence[str], console: Console) -> int:
    """Draw, check and carry out `search.trials` runs; return the exit status.

    Raises:
        ConfigError: the search or one of its first trials is wrong, and nothing was started; or a later trial is.
    """
    spec = read_search(overrides, flags, command=command)
    sweep = new_sweep(spec.config)
    runs = next_batch(spec, sweep, console=console)
    with newest(sweep.path, runs[-1], config=spec.config), RunDir(sweep.path).lock():
        return carry_out_search(spec, sweep, runs, console=console)


def carry_out_search(spec: Search, sweep: SweepDir, runs: Sequence[RunDir], *, console: Console) -> int:
    """Carry out prepared trials, then draw and carry out the remaining ones; return the exit status.

    The sweep's folder must be locked.
    """
    failed, best = 0, None
    while runs := runs or next_batch(spec, sweep, console=console):
        failed += carry_out_runs(runs, console=console)
        best, runs = write_results(spec, sweep), []
    result = f"{best['value']:.4g} with {' '.join(best['overrides'])}" if best else "none: no trial reached a value"
    console.print(f"best     {escape(result)}")
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
    for one in searched:
        if one.key_or_group.partition(".")[0] in FIXED:
            raise ConfigError(f"{one.input_line}: trials of a search share this section; give one value")
    space = {one.get_key_element(): distribution(one) for one in searched}
    first = {key: one.choices[0] if isinstance(one, CategoricalDistribution) else one.low for key, one in space.items()}
    (job,) = compose(_with_values(overrides, first))
    spec, evaluation = Search(list(overrides), list(command), space, job.config), job.config.eval
    if spec.num_trials < 1:
        raise ConfigError(f"search.trials={job.config.search.trials}: must be at least 1")
    metric, has_end = job.config.checkpoint.metric, evaluation.at_end or evaluation.period
    if metric.startswith("val/") and not (validates(job.config) and has_end):
        other = "another metric, such as train/kl_forward with checkpoint.higher_is_better=false"
        what = "decides the search, and nothing validates"
        raise ConfigError(f"checkpoint.metric={metric}: {what}; set eval.at_end=true, or choose {other}")
    return spec


def distribution(override: Override) -> Distribution:
    """Return the distribution of a key's values: over integers if its bounds are integers or the key takes no others.

    Raises:
        ConfigError: Optuna cannot draw from the range.
    """
    values: Any = override.value()
    step = None
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
        low, high, log = bounds[0], bounds[-1], "log" in values.tags
        if (isinstance(low, int) and isinstance(high, int)) or not takes_fractions(override.key_or_group):
            return IntDistribution(int(low), int(high), log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: cannot be searched: {error}") from error


def next_batch(spec: Search, sweep: SweepDir, *, console: Console) -> list[RunDir]:
    """Draw the next trials and make their folders; return none once there are `search.trials`.

    Raises:
        ConfigError: a trial is wrong; no folder was made for the batch.
    """
    drawn, known = draw(spec, sweep), len(sweep.elements())
    if not drawn:
        return []
    jobs, resolved = resolve_jobs([trial_job(spec, values) for values in drawn], is_new=not known)
    check_sweep(jobs)
    print_warnings(resolved, console=console, printed=spec.warned)
    console.print(f"trials   {known + 1} to {known + len(jobs)} of {spec.num_trials}")
    words = [word.partition("=") for word in spec.overrides]
    space = {key.lstrip("+"): text for key, _, text in words if key in spec.space}
    return add_runs(sweep, jobs, resolved, command=spec.command, space=space)


def draw(spec: Search, sweep: SweepDir) -> list[dict[str, Any]]:
    """Return the values of each trial of the next batch, by key; fractions have six digits."""
    study = study_of(spec, sweep)
    batch = min(spec.config.cluster.parallel_jobs or 1, spec.num_trials - len(study.trials))
    drawn = [study.ask(dict(spec.space)).params for _ in range(batch)]
    for key, one in spec.space.items():
        if isinstance(one, FloatDistribution):
            for values in drawn:
                values[key] = min(max(float(f"{values[key]:.6g}"), one.low), one.high)
    return drawn


def study_of(spec: Search, sweep: SweepDir) -> optuna.Study:
    """Return a study of the sweep's trials, in order; a trial that reached no value counts as failed."""
    elements, settings = sweep.elements(), spec.config.search
    seed = random.Random(f"{settings.seed} {len(elements)}").getrandbits(32)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if settings.sampler is SearchSampler.tpe:
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # spreads a batch
    direction = "maximize" if spec.config.checkpoint.keeps_highest else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    numbers: dict[type, type] = {FloatDistribution: float, IntDistribution: int}
    for element in elements:
        drawn = dict(override.split("=", 1) for override in element.overrides)
        params = {key: numbers.get(type(one), str)(drawn[key]) for key, one in spec.space.items()}
        value = final_value(RunDir(sweep.path / element.folder), spec.config.checkpoint.metric)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=dict(spec.space)))
    return study


def trial_job(spec: Search, drawn: Mapping[str, Any]) -> Job:
    """Compose a trial: a drawn value in place of each range, and without search.trials."""
    words = [word for word in spec.overrides if not word.lstrip("+").startswith("search.trials=")]
    (job,) = compose(_with_values(words, drawn))
    overrides = [override for override in job.overrides if not override.startswith("search.")]
    return replace(job, overrides=overrides, swept=[f"{key}={value}" for key, value in drawn.items()])


def write_results(spec: Search, sweep: SweepDir) -> dict[str, Any] | None:
    """Write search.json: the metric, each trial with its value, and the best trial, which is returned."""
    pairs = zip(sweep.elements(), study_of(spec, sweep).trials, strict=True)
    trials = [dict[str, Any](run=one.folder, overrides=one.overrides, value=trial.value) for one, trial in pairs]
    metric, is_higher_better = spec.config.checkpoint.metric, spec.config.checkpoint.keeps_highest
    finished = [trial for trial in trials if trial["value"] is not None]
    best = (max if is_higher_better else min)(finished, key=lambda trial: trial["value"], default=None)
    content = {"metric": metric, "higher_is_better": is_higher_better, "best": best, "trials": trials}
    write_json(sweep.path / "search.json", content)
    return best


def final_value(run: RunDir, metric: str) -> float | None:
    """Return the last value of a metric; None if the run has not finished, or the value is missing or not finite."""
    outcome = read_outcome(run)
    if outcome is None or not outcome.is_finished:
        return None
    value = last_values(run.metrics, [metric]).get(metric, math.nan)
    return value if math.isfinite(value) else None


def _with_values(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the overrides with these values in place of ranges."""
    return [f"{key}={values[key]}" if (key := word.partition("=")[0]) in values else word for word in overrides]
