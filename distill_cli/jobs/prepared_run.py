"""Run a prepared run to its end, one attempt after another: `python -m distill_cli.jobs.prepared_run RUN`.

On this machine that is one of several runs of a sweep at a time. In a job every node executes it: the first one leads,
as `distill train` does on one machine, and the others follow it.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.schema import Config
from distill_cli.config.teacher_jobs import teacher_nodes
from distill_cli.config.variation import load_config
from distill_cli.data.recorded_run import remove_later
from distill_cli.errors import ConfigError, DistillError, Killed, Stopped, TeacherLost, Unrecoverable
from distill_cli.folders.attempts import Outcome, read_outcome, record_attempt, write_outcome
from distill_cli.folders.metrics_file import cut_back, read_metrics
from distill_cli.folders.run_dir import JobEnd, RunDir, write_json
from distill_cli.jobs.run_panels import end_panel, relative
from distill_cli.jobs.teacher_jobs import end_teachers, kept
from distill_cli.launch.base import ALONE, launcher_of
from distill_cli.launch.local import STOP_SIGNALS, follow, start_ranks, stop_signals
from distill_cli.launch.nodes import Leader, node_variables
from distill_cli.report.read import read_results
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.run_tracking import tracking

LOCK_TIMEOUT_S = 150.0
"""How long a network file system may take to give up the lock of a node that died."""


def carry_out(path: Path) -> int:
    """Do this node's part of a run; return the exit status of `distill train`, or 0 if another node leads."""
    run, config = RunDir(path), load_config(RunDir(path).config)
    place = launcher_of(config.cluster.launcher).place()
    if place.node != 0:
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # the first node decides when to stop
        follow(read_resolved(run, config), run, place)
        return 0
    with closing(Leader(run, place)) as leader:
        return lead(run, config, leader)


def lead(run: RunDir, config: Config, leader: Leader) -> int:
    """Carry out a run to its end; return its exit status, which a job also leaves in the run's folder."""
    launcher, place = launcher_of(config.cluster.launcher), leader.place
    status, reason, error = 0, None, None
    console = Console(highlight=False, soft_wrap=True)
    try:
        with (
            stop_signals(),
            run.lock(wait_s=LOCK_TIMEOUT_S if place.job_id else 0.0),
            kept(run, config, place, console=console),
        ):
            launcher.check_restarts(config, place)
            resolved = read_resolved(run, config)
            reason = run_to_completion(resolved, run.unused_attempt(), console=console, leader=leader).reason
    except Stopped as stopped:
        status, reason, error = 128 + stopped.signum, str(stopped), f"stopped by {stopped}"
    except DistillError as failure:
        status, error = (2 if isinstance(failure, ConfigError) else 1), str(failure)
        print(*(f"error: {line}" for line in error.splitlines()), sep="\n", flush=True)
    if reason is not None:
        launcher.requeue(config, place, reason=reason)
    if place.job_id is not None:
        write_json(run.job_end, asdict(JobEnd(place.job_id, status, error)))
        end_teachers(run)
    return status


def read_resolved(run: RunDir, config: Config) -> ResolvedRun:
    """Return the run, with its models brought to this machine: its ranks will look in the cache alone."""
    os.environ |= node_variables(config.cluster)
    return ResolvedRun.read(run)


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
        end_teachers(run)
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
    elif outcome.state == "failed":
        saved = f"saved after step {outcome.num_steps}" if outcome.num_steps else "no step is done yet"
        raise DistillError(f"{outcome.reason}; {saved}; {resume} goes on")
    else:
        console.print(f"stopped by {escape(str(outcome.reason))} after step {outcome.num_steps}")
        console.print(f"go on    {escape(resume)}")
    return outcome


def run_attempts(resolved: ResolvedRun, run: RunDir, *, console: Console, leader: Leader) -> None:
    """Start the ranks; restart them from the newest checkpoint if they failed and that may help."""
    launched, most = time.time(), resolved.config.cluster.max_restarts
    has_jobs = bool(teacher_nodes(resolved.config))
    for number in itertools.count():
        start = begin_attempt(run, console=console)
        options = [f"--checkpoint={start.path}"] if start else []
        try:
            with record_attempt(run, launched=launched, from_step=start.step if start else 0):
                start_ranks(resolved, run, options, leader=leader)
            outcome = read_outcome(run)
            # The ranks have saved and ended because a teacher is lost. One with a job of its own comes again.
            is_lost = outcome is not None and outcome.state == "failed" and has_jobs
            if outcome is None or not is_lost or number == most:
                return
            console.warn(f"attempt {run.attempt} failed: {outcome.reason}")
        except DistillError as error:
            before = start.recorded_step if start else 0
            has_progressed = run.metrics.exists() and bool(read_metrics(run.metrics, after_step=before))
            may_help = has_progressed or isinstance(error, Killed) or (isinstance(error, TeacherLost) and has_jobs)
            if isinstance(error, ConfigError | Unrecoverable) or number == most or not may_help:
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


if __name__ == "__main__":
    sys.exit(carry_out(Path(sys.argv[1])))
