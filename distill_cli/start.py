"""`distill train`: composed jobs become runs, here or on a cluster, alone or as a sweep."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from distill_cli import rundir, submit
from distill_cli.config.compose import Job
from distill_cli.config.schema import Launcher
from distill_cli.errors import ConfigError, DistillError
from distill_cli.preflight import Preflight
from distill_cli.report.read import read_sweep
from distill_cli.report.table import print_comparison
from distill_cli.run import carry_out, check_jobs, exit_status, introduce, leave_report, prepare, single_path
from distill_cli.rundir import Element, SweepDir


def run_jobs(jobs: Sequence[Job], *, command: Sequence[str]) -> int:
    """Checks every job, then runs them one after the other; the exit status.

    A run of a sweep that fails does not stop the others.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    checked = check_jobs(jobs)
    with exit_status() as status:
        if any(job.swept for job in jobs):
            status.value = run_sweep(jobs, checked, command=command, console=console)
        else:
            status.value = run_single(jobs[0], checked[0], command=command, console=console)
    return status.value


def run_single(job: Job, found: Preflight, *, command: Sequence[str], console: Console) -> int:
    """One run in its own folder, here or as a job; the exit status."""
    path = single_path(job)
    run = prepare(job, path, command=command)
    introduce(job, found, run, console=console)
    if job.config.cluster.launcher is Launcher.local:
        rundir.point_latest(Path(job.config.run.root), os.path.relpath(path, job.config.run.root))
        with run.lock():
            carry_out(job, run, console=console)
        return 0
    try:
        job_id = submit.submit_run(job.config, run, console=console)
    except ConfigError:
        shutil.rmtree(run.path)  # nothing was started
        raise
    rundir.point_latest(Path(job.config.run.root), os.path.relpath(path, job.config.run.root))
    return submit.wait_for_run(run, job_id, console=console) if job.config.cluster.wait else 0


def run_sweep(jobs: Sequence[Job], checked: Sequence[Preflight], *, command: Sequence[str], console: Console) -> int:
    """One folder for the sweep, one in it for each run; a table at the end."""
    root = Path(jobs[0].config.run.root)
    name = jobs[0].config.run.name or rundir.free_name(root, time.strftime("%Y%m%d-%H%M%S_sweep"))
    sweep = SweepDir(root / name)
    elements = [Element(index, rundir.element_name(index, job.swept), job.swept) for index, job in enumerate(jobs)]
    sweep.write(command=command, elements=elements)
    states = []
    for element, job, found in zip(elements, jobs, checked, strict=True):
        path = sweep.path / element.folder
        console.rule(escape(f"{element.index + 1}/{len(jobs)} {' '.join(job.swept)}"), align="left")
        try:
            run = prepare(job, path, command=command)
            rundir.point_latest(root, os.path.relpath(path, root))
            introduce(job, found, run, console=console)
            with run.lock():
                states.append(carry_out(job, run, console=console)["state"])
        except DistillError as error:
            console.print(f"error: {escape(str(error))}")
            states.append("failed")
    print_comparison(console, read_sweep(sweep))
    leave_report([sweep.path], sweep.report, console=console)
    console.print(f"report   {sweep.report}")
    console.print(f"folder   {sweep.path}")
    console.print(f"again    distill report {sweep.path}")
    return 1 if "failed" in states else 0
