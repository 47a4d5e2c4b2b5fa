"""Runs that were prepared here, handed to Slurm; what is printed about them; following them to their end."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from distill_cli.config.schema import Config
from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.jobs.run import read_outcome, shown
from distill_cli.jobs.slurm_job import Task
from distill_cli.launch import slurm
from distill_cli.terminal.console import Console

POLL_S = (1.0, 15.0)
"""Seconds between two looks at the queue: few at first, then sparing the controller."""


def submit_run(config: Config, run: RunDir, *, console: Console) -> str:
    """One run as one job; its id. What to type next is printed.

    Raises:
        ConfigError: Slurm refuses the job.
    """
    (job_id,) = slurm.submit(config, run.path / "slurm", [Task(str(run.path))], name=run.path.name)
    note_job(run, job_id, run.path / "slurm")
    console.print(f"job      {job_id}")
    console.print(f"folder   {escape(shown(run.path))}")
    console.print(f"follow   distill watch {escape(shown(run.path))}")
    console.print(f"output   tail -F {escape(quoted(slurm.log_file(run.path / 'slurm', job_id)))}")
    console.print(f"cancel   scancel {job_id}")
    console.print(f"resume   distill resume {escape(shown(run.path))}")
    return job_id


def submit_array(config: Config, folder: Path, runs: Sequence[RunDir]) -> list[str]:
    """Several runs as one job array, whose scripts and output go to `folder`/slurm; the id of each one's job.

    Raises:
        ConfigError: Slurm refuses the jobs.
    """
    job_ids = slurm.submit(config, folder / "slurm", [Task(str(run.path)) for run in runs], name=folder.name)
    for run, job_id in zip(runs, job_ids, strict=True):
        note_job(run, job_id, folder / "slurm")
    return job_ids


def quoted(path: Path) -> str:
    """As it can be typed."""
    return shlex.quote(shown(path))


def note_job(run: RunDir, job_id: str, folder: Path) -> None:
    write_json(run.slurm, {"job_id": job_id, "log": str(slurm.log_file(folder, job_id))})


def in_queue(runs: Sequence[RunDir]) -> dict[Path, str]:
    """Of those whose job has not ended, by their folder: the job and its state."""
    noted = [run for run in runs if run.slurm.exists() and run.job_end() is None]
    jobs = {run.path: read_json(run.slurm)["job_id"] for run in noted}
    states = slurm.active(*jobs.values()) if jobs and shutil.which("squeue") else {}
    return {path: f"job {job_id} ({states[job_id]})" for path, job_id in jobs.items() if job_id in states}


def gone(run: RunDir) -> str | None:
    """What became of the run's job, where it ended and left no word of that in the folder; else None."""
    if not run.slurm.exists() or run.job_end() is not None or not shutil.which("squeue"):
        return None
    job_id = read_json(run.slurm)["job_id"]
    try:
        if job_id in slurm.active(job_id) or run.job_end() is not None:
            return None
    except DistillError:  # Slurm does not answer
        return None
    return f"job {job_id}: {slurm.ended_as(job_id) or 'is gone'}"


def watch(job_ids: Sequence[str]) -> Iterator[dict[str, str]]:
    """The states of those that have not ended, again and again until there is none: the last is empty."""
    wait_s = POLL_S[0]
    while True:
        states = slurm.active(*job_ids)
        yield states
        if not states:
            return
        time.sleep(wait_s)
        wait_s = min(wait_s * 1.3, POLL_S[1])


def wait_for_run(run: RunDir, job_id: str, *, console: Console) -> int:
    """Shows a job's output as it comes, until it has ended; its exit status."""
    log, position, seen, wait_s = Path(read_json(run.slurm)["log"]), 0, "", POLL_S[0]
    try:
        while state := slurm.active(job_id).get(job_id):
            if state != seen:
                console.print(f"job {job_id} is {state.lower()}")
                seen = state
            end = time.monotonic() + wait_s
            wait_s = min(wait_s * 1.3, POLL_S[1])
            while time.monotonic() < end:
                position = print_from(log, position)
                time.sleep(0.5)
    except KeyboardInterrupt:
        console.print(f"job {job_id} goes on; scancel {job_id} ends it")
        raise
    print_from(log, position)
    status, told = how_it_ended(run, job_id)
    if status:
        console.print(f"job {job_id}: {escape(told)}")
    return status


def print_from(log: Path, position: int) -> int:
    """Prints what a file holds beyond `position`; its end."""
    if not log.exists():
        return position
    with log.open("rb") as stream:
        stream.seek(position)
        new = stream.read()
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(new)


def how_it_ended(run: RunDir, job_id: str) -> tuple[int, str]:
    """The exit status of a job that has ended, and what to say of it: what its first node wrote down, or Slurm."""
    note, end = read_json(run.slurm), run.job_end()
    if end is not None:
        outcome = read_outcome(run)
        return end["status"], outcome["state"] if outcome else f"{end['error']}; output: {note['log']}"
    said = slurm.ended_as(job_id) or "gone, and nobody knows how"
    if not Path(note["log"]).exists():
        said += f"; it wrote nothing to {note['log']}: do the nodes see that folder? if not, choose another run.root"
    return (143 if said.startswith("CANCELLED") else 1), said
