"""`distill train`: composed jobs become runs, here or on a cluster, alone or as a sweep."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_cli.config.compose import Job, compose, hydra_plugins
from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.jobs.preflight import Preflight
from distill_cli.jobs.prepare import check_jobs, prepare, print_warnings, resolve_jobs, single_path
from distill_cli.jobs.run_attempts import run_to_completion
from distill_cli.jobs.run_panels import start_panel
from distill_cli.jobs.submit import submit, wait_for_run
from distill_cli.jobs.sweep import add_runs, carry_out_sweep, check_sweep, discard_if_refused, new_sweep
from distill_cli.launch.base import launcher_of
from distill_cli.terminal.console import Console


def train(argv: Sequence[str], *, command: Sequence[str]) -> int:
    """What was typed, to its end or into the queue; the exit status.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    if plugins := hydra_plugins(argv):
        from distill_cli.jobs.hydra_sweep import run_through_hydra

        return run_through_hydra(argv, plugins, command=command, console=new_console())
    jobs = compose(argv)
    return run_jobs(jobs, command=command) if jobs else 0


def new_console() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def run_jobs(jobs: Sequence[Job], *, command: Sequence[str]) -> int:
    """Checks every job, then runs them one after the other; the exit status.

    A run of a sweep that fails does not stop the others.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    console, jobs = new_console(), resolve_jobs(jobs)
    checked = check_jobs(jobs)
    if any(job.swept for job in jobs):
        return run_sweep(jobs, checked, command=command, console=console)
    return run_single(jobs[0], checked[0], command=command, console=console)


def run_single(job: Job, checked: Preflight, *, command: Sequence[str], console: Console) -> int:
    """Carry out one run in its own folder, here or as a job; return the exit status."""
    root, path = Path(job.config.run.root), single_path(job)
    run = prepare(job, checked, path, command=command)
    print_warnings([job], [checked], console=console, printed=set())
    console.print(start_panel(job.config, checked, run))
    if launcher_of(job.config.cluster.launcher).runs_here:
        run_dir.point_latest(root, os.path.relpath(path, root))
        with run.lock():
            run_to_completion(job, run, console=console)
        return 0
    try:
        (submitted,) = submit(job.config, [run], folder=run.path, console=console)
    except ConfigError:
        shutil.rmtree(run.path)  # nothing was started
        raise
    run_dir.point_latest(root, os.path.relpath(path, root))
    return wait_for_run(run, submitted, console=console) if job.config.cluster.wait else 0


def run_sweep(jobs: Sequence[Job], checked: Sequence[Preflight], *, command: Sequence[str], console: Console) -> int:
    """Carry out several runs, each in its folder inside the sweep's; return the exit status."""
    check_sweep(jobs)
    config, sweep = jobs[0].config, new_sweep(jobs[0].config)
    elements = add_runs(sweep, jobs, checked, command=command)
    print_warnings(jobs, checked, console=console, printed=set())
    try:
        return carry_out_sweep(sweep, elements, config, console=console)
    except ConfigError:
        discard_if_refused(sweep, elements, config)
        raise
