"""Train a student on its own answers, scored by a teacher (the default verb).

The whole configuration is checked first: everything wrong with it is reported at once (status 2), before anything
starts. Then the run's folder is written, the ranks start, and each step prints a line.

examples
  distill                                              the embedded pair, on this machine's CPU
  distill experiment=quick                             ten steps of it
  distill loss=reverse loss.topk=32 train.lr=1e-3      a choice of a group, and keys
  distill -m loss.topk=32,64 loss.kl_weight=0.3,0.5    a sweep of four runs; hydra/sweeper=optuna searches instead
  distill cluster=slurm cluster.partition=gpu          the same as a job
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from distill_cli.config.compose import Job, compose, hydra_plugins
from distill_cli.config.flags import add_hydra_flags
from distill_cli.config.schema import Launcher
from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs import submit
from distill_cli.jobs.preflight import Preflight
from distill_cli.jobs.run import carry_out, check_jobs, exit_status, introduce, prepare, print_warnings, single_path
from distill_cli.jobs.sweep import carry_out_sweep, discard, prepare_sweep
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import Parser


def declare(parser: Parser) -> None:
    parser.takes_overrides()
    parser.takes_wait()
    parser.add_argument("--version", action="store_true", help="print distill's version")
    add_hydra_flags(parser)


def main(arguments: argparse.Namespace) -> int:
    """Train what was typed to its end, or submit it; return the exit status.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    if arguments.version:
        print(f"distill {metadata.version('distill-cli')}")
        return 0
    overrides, flags, command = arguments.overrides, arguments.flags, arguments.command
    if plugins := hydra_plugins(overrides):
        from distill_cli.jobs.hydra_sweep import run_through_hydra

        with exit_status() as status:
            status.value = run_through_hydra(overrides, flags, plugins, command=command, console=new_console())
        return status.value
    jobs = compose(overrides, flags)
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
    console = new_console()
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
        run_dir.point_latest(Path(job.config.run.root), os.path.relpath(path, job.config.run.root))
        with run.lock():
            carry_out(job, run, console=console)
        return 0
    try:
        job_id = submit.submit_run(job.config, run, console=console)
    except ConfigError:
        shutil.rmtree(run.path)  # nothing was started
        raise
    run_dir.point_latest(Path(job.config.run.root), os.path.relpath(path, job.config.run.root))
    return submit.wait_for_run(run, job_id, console=console) if job.config.cluster.wait else 0


def run_sweep(jobs: Sequence[Job], checked: Sequence[Preflight], *, command: Sequence[str], console: Console) -> int:
    """One folder for the sweep, one in it for each run; the exit status."""
    config, sweep = jobs[0].config, prepare_sweep(jobs, checked, command=command)
    print_warnings(jobs, checked, console=console, told=set())
    elements = sweep.elements()
    try:
        return carry_out_sweep(sweep, elements, config, console=console)
    except ConfigError:
        if config.cluster.launcher is Launcher.slurm and not RunDir(sweep.path / elements[-1].folder).slurm.exists():
            discard(sweep)  # Slurm has refused it
        raise
