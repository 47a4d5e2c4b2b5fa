"""A prepared run, to its end: one attempt after another, each from the newest checkpoint."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.data.recorded_run import remove_later
from distill_cli.errors import ConfigError, DistillError, Killed, Stopped, Unrecoverable
from distill_cli.folders.attempts import Outcome, record_attempt, write_outcome
from distill_cli.folders.metrics_file import cut_back, read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.run_panels import end_panel, relative
from distill_cli.launch.local import start_ranks
from distill_cli.launch.nodes import ALONE, Leader
from distill_cli.report.read import read_results
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.run_tracking import tracking


def run_to_completion(
    resolved: ResolvedRun, run: RunDir, *, console: Console, leader: Leader | None = None, sweep: Path | None = None
) -> Outcome:
    """Start the ranks until the run has ended; return the outcome that they wrote. The folder is locked.

    Args:
        leader: commands the other nodes of the job that this is part of; None outside a job.
        sweep: folder of the sweep that is carried out, which `distill resume` takes if it is stopped.

    Raises:
        DistillError: an attempt failed, and no other may follow or would fare better.
        Stopped: the user or the system stopped it.
    """
    leader, resume = leader or Leader(run, ALONE), f"distill resume {relative(sweep or run.path)}"
    if leader.place.job_id is None:
        run.job.unlink(missing_ok=True)  # the run may have been a job before
    try:
        with tracking(resolved, run):
            try:
                run_attempts(resolved, run, console=console, leader=leader)
            except DistillError:
                if run.metrics.exists():  # the steps before the failure
                    leave_report([run.path], run.report, console=console)
                raise
            leave_report([run.path], run.report, console=console)
    except Stopped:
        saved, outcome = "the last checkpoint is what is left", write_outcome(run)
        if outcome is not None:
            saved = f"saved after step {outcome.num_steps}" if outcome.num_steps else "no step is done yet"
        console.print(f"stopped: {saved}; {escape(resume)} goes on")
        raise
    outcome = write_outcome(run)
    assert outcome is not None, "ranks that end with status 0 write their outcome"
    if outcome.is_finished:
        console.print(end_panel(resolved, outcome, run))
    else:
        console.print(f"stopped by {escape(str(outcome.reason))} after step {outcome.num_steps}")
        console.print(f"go on    {escape(resume)}")
    return outcome


def run_attempts(resolved: ResolvedRun, run: RunDir, *, console: Console, leader: Leader) -> None:
    """Start the ranks; restart them from the newest checkpoint if they failed and that may help."""
    launched = time.time()
    for number in itertools.count():
        start = begin_attempt(run, console=console)
        options = [f"--checkpoint={start.path}"] if start else []
        try:
            with record_attempt(run, launched=launched, from_step=start.step if start else 0):
                start_ranks(resolved, run, options, leader=leader)
            return
        except (ConfigError, Unrecoverable):
            raise
        except DistillError as error:
            before = start.recorded_step if start else 0
            has_progressed = run.metrics.exists() and bool(read_metrics(run.metrics, after_step=before))
            may_help = has_progressed or isinstance(error, Killed)
            if number == resolved.config.cluster.max_restarts or not may_help:
                raise
            console.warn(f"attempt {run.attempt} failed: {error}")
            run = run.next_attempt()


def begin_attempt(run: RunDir, *, console: Console) -> Checkpoint | None:
    """Bring the folder back to its newest whole checkpoint, and return that; None begins at the beginning."""
    store.remove_unfinished(run.checkpoints)
    start = store.newest_whole(run.checkpoints, warn=console.warn)
    run.outcome.unlink(missing_ok=True)
    remove_later(run.scores, step=start.step if start else 0)
    removed_to = run.path / f"metrics.cut_{run.attempt}.jsonl"
    cut_back(run.metrics, last_step=start.recorded_step if start else -1, removed_to=removed_to)
    if start is not None:
        console.print(f"attempt {run.attempt} goes on from the checkpoint of step {start.step}")
    elif run.attempt > 1:
        console.print(f"attempt {run.attempt} begins at the beginning: there is no checkpoint yet")
    return start


def leave_report(paths: Sequence[Path], file: Path, *, console: Console) -> None:
    """Write the page about these runs; only warn if it fails, since it shows nothing that is not in their folders."""
    from distill_cli.report.html import write_report  # its libraries take a while to import

    try:
        write_report(read_results(paths), file)
    except Exception as error:
        if os.environ.get("DISTILL_DEBUG"):
            raise
        console.warn(f"no {file.name} could be made: {type(error).__name__}: {error}")
