"""`python -m distill_cli.jobs.prepared_run RUN`: carry out a prepared run in a process of its own.

On this machine that is one of several runs of a sweep at a time. In a job every node executes it: the first one leads,
as `distill train` does on one machine, and the others follow it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.folders.run_dir import JobEnd, RunDir, write_json
from distill_cli.jobs.run_attempts import run_to_completion
from distill_cli.launch.base import launcher_of
from distill_cli.launch.local import STOP_SIGNALS, follow, stop_signals
from distill_cli.launch.node_paths import node_variables
from distill_cli.launch.nodes import Leader
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console

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
    leader = Leader(run, place)
    try:
        return lead(run, config, leader)
    finally:
        leader.end()


def lead(run: RunDir, config: Config, leader: Leader) -> int:
    """Carry out a run to its end; return its exit status, which a job also leaves in the run's folder."""
    launcher, place = launcher_of(config.cluster.launcher), leader.place
    status, reason, error = 0, None, None
    try:
        with stop_signals(), run.lock(wait_s=LOCK_TIMEOUT_S if place.job_id else 0.0):
            launcher.check_restarts(config, place)
            resolved, console = read_resolved(run, config), Console(highlight=False, soft_wrap=True)
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
    return status


def read_resolved(run: RunDir, config: Config) -> ResolvedRun:
    """Return the run, with its models brought to this machine: its ranks will look in the cache alone."""
    os.environ |= node_variables(config.cluster)
    return ResolvedRun.read(run)


if __name__ == "__main__":
    sys.exit(carry_out(Path(sys.argv[1])))
