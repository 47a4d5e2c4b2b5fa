"""New runs, carried out here or submitted: one in a folder of its own, several as a sweep, or a replay."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_cli.config.compose import Job
from distill_cli.config.variation import load_config, override
from distill_cli.data.recorded_run import Recording
from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.prepare import job_of, prepare, print_warnings, resolve_jobs, single_path
from distill_cli.jobs.run_attempts import run_to_completion
from distill_cli.jobs.run_panels import start_panel
from distill_cli.jobs.submit import submit, wait_for_run
from distill_cli.jobs.sweep import add_runs, carry_out_sweep, check_sweep, discard_if_refused, new_sweep
from distill_cli.launch.base import launcher_of
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.base import tracker_names


def new_console() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def replay_job(run: RunDir, overrides: Sequence[str]) -> Job:
    """Return the job that trains on a recorded run: its config for all its steps without engines, then overrides.

    Raises:
        ConfigError: the run has no scores, or an override is wrong.
    """
    config = override(
        load_config(run.config),
        {
            "rollout.replay": str(run.path),
            "rollout.save_scores": False,
            "train.max_steps": Recording.of(str(run.path)).num_steps,
            **{f"eval.{key}": False for key in ("at_start", "at_end", "teacher")},
            **{"eval.period": 0, "eval.record_samples": 0, "run.name": None},
            **{f"tracker.{name}.run_name": None for name in tracker_names()},
        },
    )
    config = override(config, overrides, typed=job_of(run).overrides)
    losses = [word.partition("=")[2] for word in overrides if word.startswith("loss=")]
    choices = {"model": "replay", "loss": (losses or [config.loss.kl_type.replace(":", "_")])[-1]}
    return Job(config=config, choices=choices, overrides=list(overrides), swept=[])


def run_jobs(jobs: Sequence[Job], *, command: Sequence[str]) -> int:
    """Check every job, then run them one after the other; return the exit status.

    A failed run does not stop the others of its sweep.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    console = new_console()
    jobs, resolved = resolve_jobs(jobs)
    if any(job.swept for job in jobs):
        return run_sweep(jobs, resolved, command=command, console=console)
    return run_single(jobs[0], resolved[0], command=command, console=console)


def run_single(job: Job, resolved: ResolvedRun, *, command: Sequence[str], console: Console) -> int:
    """Carry out one run, here or as a job; return the exit status."""
    cluster, root, path = job.config.cluster, Path(job.config.run.root), single_path(job)
    run = prepare(resolved, path, command=command)
    print_warnings([job], [resolved], console=console, printed=set())
    console.print(start_panel(resolved, run))
    if launcher_of(cluster.launcher).runs_here:
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
    return wait_for_run(run, submitted, console=console) if cluster.wait else 0


def run_sweep(jobs: Sequence[Job], resolved: Sequence[ResolvedRun], *, command: Sequence[str], console: Console) -> int:
    """Carry out several runs, each in its folder inside the sweep's; return the exit status."""
    check_sweep(jobs)
    config, sweep = jobs[0].config, new_sweep(jobs[0].config)
    elements = add_runs(sweep, jobs, resolved, command=command)
    print_warnings(jobs, resolved, console=console, printed=set())
    try:
        return carry_out_sweep(sweep, elements, config, console=console)
    except ConfigError:
        discard_if_refused(sweep, elements, config)
        raise
