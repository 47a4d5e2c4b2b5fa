"""Runs that are resumed: alone, as what is left of a sweep, or as what is left of a search."""

import shutil
from collections.abc import Sequence
from functools import partial

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.schema import Schedule
from distill_cli.config.variation import forbidden_changes, load_config, override
from distill_cli.data.row_check import KnownData
from distill_cli.errors import ConfigError, collect, refuse
from distill_cli.folders.attempts import attempt_lines, attempts_of, finished_steps
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.prepare import write_resolved
from distill_cli.jobs.run_jobs import carry_out_sweep, start
from distill_cli.jobs.submit import in_queue, wait_for_run
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console


def resume_run(run: RunDir, step: str | None, overrides: Sequence[str], *, console: Console) -> int:
    """Resume one run, here or as a job; return the exit status."""
    with run.lock():
        check_not_queued([run])
        resolved, begin = resolve_resumed(run, overrides, step=step, console=console)
        if step is None and (done := finished_steps(run)) >= resolved.num_steps:
            fix = "give train.max_steps=N to go on, or --step N to go on from an earlier checkpoint"
            raise ConfigError(f"{run.path}: finished after {done} steps; {fix}")
        for warning in (*resolved.warnings, *schedule_warnings(run, resolved)):
            console.warn(warning)
        write_resolved(run, resolved)
        if step is not None and begin is not None:
            set_aside(run, later_than=begin.step)
        attempt = run.next_attempt()
        for line in attempt_lines(attempts_of(run)):
            console.print(escape(line))
        submitted = start(resolved, attempt, console=console)
    return wait_for_run(run, submitted, console=console) if submitted else 0


def resume_sweep(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> int:
    """Resume what did not finish of a sweep, here or as a job array; return the exit status. Queued runs stay queued.

    Raises:
        ConfigError: nothing is left to do, or some run cannot go on; nothing was started.
    """
    runs = reopen(sweep, overrides, console=console)
    if not runs:
        fix = "give train.max_steps=N to extend finished runs"
        raise ConfigError(f"{sweep.path}: every run has finished or is in the queue; {fix}")
    return carry_out_sweep(runs, console=console)


def resume_search(
    sweep: SweepDir, typed: Sequence[str], flags: Sequence[str], overrides: Sequence[str], *, console: Console
) -> int:
    """Resume the trials that did not finish, then draw the remaining ones; return the exit status.

    Args:
        typed: the overrides that the search was started with; `flags` are Hydra's.
        overrides: `search.*` are for the trials that remain, the others for all.

    Raises:
        ConfigError: all trials have finished, some are in the queue, or some trial cannot go on; nothing was started.
    """
    from distill_cli.jobs.search import carry_out_search, read_search  # imports Optuna

    newest = {word.partition("=")[0]: word for word in [*typed, *overrides]}
    search, runs = read_search(list(newest.values()), flags, command=sweep.command()), sweep.runs()
    with RunDir(sweep.path).lock():
        check_not_queued(runs)
        others = [word for word in overrides if not word.startswith("search.")]
        unfinished = reopen(sweep, others, console=console)
        if not unfinished and len(runs) >= search.num_trials:
            raise ConfigError(f"{sweep.path}: all {len(runs)} trials have finished; give search.trials=N for more")
        return carry_out_search(search, sweep, unfinished, console=console)


def reopen(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> list[RunDir]:
    """Write the overrides into the config of each run that goes on; return these, without those in the queue.

    Raises:
        ConfigError: some run cannot go on; nothing was written.
    """
    runs = sweep.runs()
    candidates = [run for run in runs if overrides or finished_steps(run) < 0]
    queued = in_queue(candidates)
    for path, job in queued.items():
        console.print(f"left     {escape(path.name)}: in the queue as {job}")
    known: KnownData = {}
    resolve = partial(resolve_resumed, overrides=overrides, known=known, console=console)
    left = [run for run in candidates if run.path not in queued]
    found = zip(left, collect(partial(resolve, run) for run in left), strict=True)
    going_on = [(run, resolved) for run, (resolved, _) in found if finished_steps(run) < resolved.num_steps]
    for run, resolved in going_on:
        write_resolved(run, resolved)
    if going_on:
        console.print(f"{len(going_on)} of {len(runs)} runs go on")
    return [run for run, _ in going_on]


def check_not_queued(runs: Sequence[RunDir]) -> None:
    """Raise ConfigError if the job of one of these runs has not ended."""
    queued = in_queue(runs).items()
    refuse(f"{path}: in the queue as {job}; wait for it to end, or cancel it" for path, job in queued)


def resolve_resumed(
    run: RunDir, overrides: Sequence[str], *, console: Console, step: str | None = None, known: KnownData | None = None
) -> tuple[ResolvedRun, Checkpoint | None]:
    """Check a run with overrides on top; return it, and the checkpoint to go on from (None: the beginning).

    Raises:
        ConfigError: the config is wrong or does not fit the checkpoint, or `step` has none.
    """
    config = override(load_config(run.config), overrides, typed=run.typed_overrides())
    if step is None:
        start = store.newest_whole(run.checkpoints, warn=console.warn)
    else:
        start = store.choose(run.checkpoints, step, config.checkpoint, warn=console.warn)
    made_with = load_config(start.path / store.CONFIG if start else run.config)
    rule = "which has shaped its weights; leave it, or start a new run"
    changes = forbidden_changes(made_with, config, unless="resume")
    refuse(f"{key}={new}: the run was made with {old}, {rule}" for key, old, new in changes)
    resolved = preflight(config, known)
    if start is not None:
        store.check_base(start, resolved.student)
    return resolved, start


def schedule_warnings(run: RunDir, resolved: ResolvedRun) -> list[str]:
    """Warn if the learning rate's schedule ends at another step than before; call this before `write_resolved`."""
    try:
        before = ResolvedRun.read(run, needs_teacher=False).num_steps
    except ConfigError:  # resolved.json is damaged, or its models have moved
        return []
    schedule, after = resolved.config.train.schedule, resolved.num_steps
    text = f"train.schedule={schedule.value} now ends at step {after} instead of {before}: learning rates differ"
    return [] if schedule is Schedule.constant or after == before else [text]


def set_aside(run: RunDir, *, later_than: int) -> None:
    """Move later checkpoints into checkpoints_aside/, where no attempt looks for them."""
    for checkpoint in store.find(run.checkpoints):
        if checkpoint.step > later_than:
            target = run.path / "checkpoints_aside" / checkpoint.path.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.path.rename(target)
