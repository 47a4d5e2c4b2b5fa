"""Runs that were prepared here, handed to Slurm; what is printed about them; following them to their end."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError
from distill_cli.launch import slurm
from distill_cli.run import shown
from distill_cli.rundir import RunDir, read_json, write_json
from distill_cli.slurm_job import Task

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
    console.print(f"follow   tail -F {escape(shlex.quote(shown(slurm.log_file(run.path / 'slurm', job_id))))}")
    console.print(f"cancel   scancel {job_id}")
    console.print(f"resume   distill resume {escape(shown(run.path))}")
    return job_id


def note_job(run: RunDir, job_id: str, folder: Path) -> None:
    write_json(run.slurm, {"job_id": job_id, "log": str(slurm.log_file(folder, job_id)), "status": None})


def check_not_queued(runs: Sequence[RunDir]) -> None:
    """Raises ConfigError where a job that has one of these runs has not ended."""
    noted = {run: read_json(run.slurm) for run in runs if run.slurm.exists()}
    jobs = {run: note["job_id"] for run, note in noted.items() if note["status"] is None}
    states = slurm.active(*jobs.values()) if jobs and shutil.which("squeue") else {}
    problems = [
        f"{run.path}: Slurm has it as job {job_id} ({states[job_id]}); wait for it to end, or scancel {job_id}"
        for run, job_id in jobs.items()
        if job_id in states
    ]
    if problems:
        raise ConfigError(*problems)


def wait_for_run(run: RunDir, job_id: str, *, console: Console) -> int:
    """Shows a job's output as it comes, until it has ended; its exit status."""
    log, position, wait_s = Path(read_json(run.slurm)["log"]), 0, POLL_S[0]
    is_active, seen = True, ""
    while is_active:
        state = slurm.active(job_id).get(job_id)
        is_active = state is not None
        if state and state != seen:
            seen = state
            console.print(f"job {job_id} is {state.lower()}")
        end = time.monotonic() + (wait_s if is_active else 0)
        wait_s = min(wait_s * 1.3, POLL_S[1])
        while True:
            position = print_from(log, position)
            if time.monotonic() >= end:
                break
            time.sleep(0.5)
    return exit_status(run, job_id, console=console)


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


def exit_status(run: RunDir, job_id: str, *, console: Console) -> int:
    """That of a job that has ended: what its first node wrote down, or 1 where it did not come to that."""
    state: dict[str, Any] = read_json(run.slurm)
    if state["status"] is not None:
        return state["status"]
    said = slurm.ended_as(job_id) or "gone"
    if not Path(state["log"]).exists():
        said += (
            f", and it wrote nothing to {state['log']}: the nodes may not see that folder; choose a run.root that they "
            "see"
        )
    console.print(f"job {job_id} ended without a word: {escape(said)}")
    return 143 if said.startswith("CANCELLED") else 1
