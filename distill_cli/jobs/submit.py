"""Submit prepared runs as jobs of a cluster, find them in its queue, and follow runs to their end."""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from distill_cli.config.schema import Config
from distill_cli.config.teachers import ONLY
from distill_cli.config.variation import load_config, plain
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, SubmittedJob, write_json
from distill_cli.jobs.run_panels import print_lines, relative
from distill_cli.jobs.teacher_jobs import end_teachers, submit_teachers
from distill_cli.launch.base import launcher_of
from distill_cli.report.read import state_of
from distill_cli.report.verdict import verdict
from distill_cli.terminal.console import Console
from distill_cli.terminal.step_printer import StepPrinter

POLL_S = (1.0, 15.0)
"""Seconds between two looks at the queue: short at first, then sparing the controller."""
LOOK_S = 0.5
"""Seconds between two looks at the files of a run."""
GOING_ON = ("waiting", "running")


def submit(config: Config, runs: Sequence[RunDir], *, folder: Path, console: Console) -> list[SubmittedJob]:
    """Submit a run, or those of a sweep as one array; print what to type next.

    Args:
        folder: the run's, or the sweep's.

    Raises:
        ConfigError: the cluster refuses the jobs.
    """
    launcher = launcher_of(config.cluster.launcher)
    before = [run.job.read_text() if run.job.exists() else None for run in runs]
    for run in runs:  # the teachers' servers must not take an earlier job for the run's
        run.job.unlink(missing_ok=True)
    try:
        teachers = submit_teachers(config, runs[0]) if runs[0].path == folder else {}
        jobs = launcher.submit(config, runs, folder=folder, after=[job.job_id for job in teachers.values()])
    except ConfigError:
        end_teachers(runs[0])
        for run, text in zip(runs, before, strict=True):
            if text is not None:
                run.job.write_text(text)
        raise
    for run, job in zip(runs, jobs, strict=True):
        write_json(run.job, asdict(job))
    path, hints = shlex.quote(relative(folder)), launcher.hints([job.job_id for job in jobs])
    lines = {"job": hints.pop("job"), **teacher_lines(teachers)}
    lines |= {"folder": path, "follow": f"distill report {path}"}
    if runs[0].path == folder:
        output = f"tail -F {shlex.quote(relative(Path(jobs[0].log)))}"
        lines |= {"follow": f"distill watch {path}", "output": output}
    print_lines(console, {**lines, **hints, "resume": f"distill resume {path}"})
    return jobs


def teacher_lines(jobs: Mapping[str, SubmittedJob]) -> dict[str, str]:
    """Return a line for the jobs of the teachers, if there are any."""
    ids = ", ".join(job.job_id if name == ONLY else f"{job.job_id} ({name})" for name, job in jobs.items())
    return {"teacher": f"{'job' if len(jobs) == 1 else 'jobs'} {ids}"} if jobs else {}


def in_queue(runs: Sequence[RunDir]) -> dict[Path, str]:
    """Return job and state of each run whose job has not ended, by the run's folder."""
    jobs = {run.path: job for run in runs if (job := run.open_job())}
    states: dict[SubmittedJob, str] = {}
    for launcher in map(launcher_of, {job.launcher for job in jobs.values()}):
        ours = {job.job_id: job for job in jobs.values() if job.launcher == launcher.name}
        if launcher.is_installed():
            states |= {ours[job_id]: state for job_id, state in launcher.status(list(ours)).items()}
    return {path: f"job {job.job_id} ({states[job]})" for path, job in jobs.items() if job in states}


def lost_job_reason(run: RunDir) -> str | None:
    """Return what became of the run's job if it ended without writing its outcome; else None."""
    job = run.open_job()
    with suppress(DistillError):  # the cluster does not answer
        if job and launcher_of(job.launcher).is_installed() and not in_queue([run]) and run.open_job():
            return f"job {job.job_id}: {launcher_of(job.launcher).end_state(job.job_id) or 'is gone'}"
    return None


def queue_waits() -> Iterator[float]:
    """Yield the seconds from each look at the queue to the next."""
    wait_s, most = POLL_S
    while True:
        yield wait_s
        wait_s = min(wait_s * 1.3, most)


def wait_for_run(run: RunDir, job: SubmittedJob, *, console: Console) -> int:
    """Show a job's output as it comes, until the job has ended; return its exit status."""
    launcher, position, last_state = launcher_of(job.launcher), 0, ""
    try:
        for wait_s in queue_waits():
            if (state := launcher.status([job.job_id]).get(job.job_id)) is None:
                break
            if state != last_state:
                console.print(f"job {job.job_id} is {state.lower()}")
                last_state = state
            end = time.monotonic() + wait_s
            while time.monotonic() < end:
                position = print_from(Path(job.log), position)
                time.sleep(LOOK_S)
    except KeyboardInterrupt:
        console.print(f"job {job.job_id} goes on; {launcher.hints([job.job_id])['cancel']} ends it")
        raise
    print_from(Path(job.log), position)
    end_teachers(run)  # else their servers notice it half a minute later
    status, text = job_outcome(run, job)
    if status:
        console.print(f"job {job.job_id}: {escape(text)}")
    return status


def wait_for_sweep(runs: Sequence[RunDir], jobs: Sequence[SubmittedJob], *, console: Console) -> int:
    """Print which runs have ended, until all have; return how many failed. Each run's folder is read once."""
    launcher, failed = launcher_of(jobs[0].launcher), 0
    open_jobs = dict(zip(jobs, runs, strict=True))
    for wait_s in queue_waits():
        active = launcher.status([job.job_id for job in open_jobs])
        for job in [job for job in open_jobs if job.job_id not in active]:
            run = open_jobs.pop(job)
            status, text = job_outcome(run, job)
            failed += status != 0
            console.print(f"{len(runs) - len(open_jobs)}/{len(runs)}  {escape(f'{run.path.name}: {text}')}")
        if not open_jobs:
            break
        time.sleep(wait_s)
    return failed


def print_from(log: Path, position: int) -> int:
    """Print a file's content beyond `position`; return its end."""
    with suppress(FileNotFoundError), log.open("rb") as stream:
        stream.seek(position)
        sys.stdout.write(stream.read().decode(errors="replace"))
        sys.stdout.flush()
        return stream.tell()
    return position


def job_outcome(run: RunDir, job: SubmittedJob) -> tuple[int, str]:
    """Return the exit status of a job that has ended, and why: by its first node's record, or by the cluster."""
    if (end := run.end_of(job)) is not None:
        outcome = read_outcome(run)
        return end.status, outcome.state if outcome else f"{end.error}; output: {job.log}"
    reason = launcher_of(job.launcher).end_state(job.job_id) or "exited without writing its outcome"
    if not Path(job.log).exists():
        reason += f"; it wrote nothing to {job.log}: do the nodes see that folder? if not, choose another run.root"
    return (143 if reason.startswith("CANCELLED") else 1), reason


def follow(run: RunDir, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show the recorded steps and the new ones until the run has ended; return 1 if it failed, else 0.

    The queue is polled too: a job that the cluster killed leaves nothing in the run's files.
    """
    config = load_config(run.config)
    with StepPrinter(sys.stdout, num_steps=config.train.max_steps, title=f"distill watch  {run.path.name}") as printer:
        for name, text in teacher_lines(run.teacher_jobs()).items():
            printer.say(f"{name} in {text}")
        last, polled, lost = -1, -math.inf, None
        while True:
            if time.monotonic() >= polled + POLL_S[1]:
                polled, lost = time.monotonic(), lost_job_reason(run)
            state = state_of(run)  # read before the rows, so that no row of a run that has ended is missed
            if state == "stopped" and run.open_job() and not lost:
                state = "waiting"  # the job has not written that it ended: the cluster will start it again
            elif state in GOING_ON and lost:
                state = "failed"
            now = run.newest_attempt().now()
            if now is not None:
                printer.screen.num_steps = now[1]
            if state == "waiting" or now is not None:
                printer.stage(now[0] if now and state == "running" else state)
            rows = read_metrics(run.metrics) if run.metrics.exists() else []
            if rows and rows[-1]["step"] < last:
                last = int(rows[-1]["step"])
                printer.say(f"the run goes on from the checkpoint of step {last}")
            for row in [row for row in rows if row["step"] > last]:
                last = int(row["step"])
                metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
                printer.step(last, metrics, at=row["time"])
                printer.screen.began = min(printer.screen.began, rows[0]["time"])
            if state not in GOING_ON:
                break
            sleep(LOOK_S)
    if lost:
        print(lost)
    for sentence in verdict(rows, plain(config)):
        print(f"verdict  {sentence}")
    verb, does = ("report", "shows its results") if state == "finished" else ("resume", "goes on")
    print(f"{state} after step {max(last, 0)}; distill {verb} {run.path} {does}")
    return int(state == "failed")
