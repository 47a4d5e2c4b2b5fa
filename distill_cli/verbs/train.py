"""Train a student on its own answers, scored by a teacher (the default verb).

The whole configuration is checked first: everything wrong with it is reported at once (status 2), before anything
starts. Then the run's folder is written, the ranks start, and each step prints a line.

examples
  distill                                              the embedded pair, on this machine's CPU
  distill experiment=quick                             ten steps of it
  distill loss=reverse loss.topk=32 train.lr=1e-3      a choice of a group, and keys
  distill -m loss.topk=32,64 loss.kl_weight=0.3,0.5    a sweep of four runs; search.trials=20 draws runs instead
  distill cluster=slurm cluster.slurm.partition=gpu          the same as a job
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from distill_cli.config.compose import Job, compose
from distill_cli.config.flags import add_hydra_flags
from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.jobs.prepare import prepare, print_warnings, resolve_jobs, single_path
from distill_cli.jobs.run_attempts import run_to_completion
from distill_cli.jobs.run_panels import start_panel
from distill_cli.jobs.submit import submit, wait_for_run
from distill_cli.jobs.sweep import add_runs, carry_out_sweep, check_sweep, discard_if_refused, new_sweep
from distill_cli.launch.base import launcher_of
from distill_cli.resolved import ResolvedRun
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
    if any(word.lstrip("+").startswith("search.trials=") and not word.endswith("=null") for word in overrides):
        from distill_cli.jobs.search import search  # Optuna takes a while to import

        return search(overrides, flags, command=command, console=new_console())
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
    jobs, resolved = resolve_jobs(jobs)
    if any(job.swept for job in jobs):
        return run_sweep(jobs, resolved, command=command, console=console)
    return run_single(jobs[0], resolved[0], command=command, console=console)


def run_single(job: Job, found: ResolvedRun, *, command: Sequence[str], console: Console) -> int:
    """Carry out one run in its own folder, here or as a job; return the exit status."""
    root, path = Path(job.config.run.root), single_path(job)
    run = prepare(found, path, command=command)
    print_warnings([job], [found], console=console, printed=set())
    console.print(start_panel(found, run))
    if launcher_of(job.config.cluster.launcher).runs_here:
        run_dir.point_latest(root, os.path.relpath(path, root))
        with run.lock():
            run_to_completion(found, run, console=console)
        return 0
    try:
        (submitted,) = submit(job.config, [run], folder=run.path, console=console)
    except ConfigError:
        shutil.rmtree(run.path)  # nothing was started
        raise
    run_dir.point_latest(root, os.path.relpath(path, root))
    return wait_for_run(run, submitted, console=console) if job.config.cluster.wait else 0


def run_sweep(jobs: Sequence[Job], resolved: Sequence[ResolvedRun], *, command: Sequence[str], console: Console) -> int:
    """Carry out several runs, each in its folder inside the sweep's; return the exit status."""
    check_sweep(jobs)
    config, sweep = jobs[0].config, new_sweep(jobs[0].config)
    elements = add_runs(sweep, jobs, resolved, command=command)
    print_warnings(jobs, resolved, console=console, printed=set())
    try:
        return carry_out_sweep(sweep, elements, console=console)
    except ConfigError:
        discard_if_refused(sweep, elements, config)
        raise
