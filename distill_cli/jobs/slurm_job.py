"""What a Slurm job runs: one task on each node, pickled by `submit` and started by submitit.

The first node's task leads, as the launcher does on one machine (`run.carry_out`); the others follow it
(`launch.local.follow`). A warning (SIGUSR2, before the time limit) or a preemption lets the ranks save, and queues the
job again: it goes on in the same folder, as the next attempt. Any other SIGTERM is scancel's: the run stays down.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.jobs.run import carry_out, job_of, locate_models, read_outcome
from distill_cli.launch.local import STOP_SIGNALS, Stopped, follow, stop_signals
from distill_cli.launch.nodes import Head, address_of
from distill_cli.launch.placement import placement
from distill_cli.launch.slurm import ask
from distill_cli.machine import hardware
from distill_cli.terminal.console import Console

LOCK_TIMEOUT_S = 150.0
"""How long a network file system may take to give up the lock of a node that died."""
REQUEUE_S = 300.0
"""More than Slurm takes to end a job that is queued again."""


@dataclass(frozen=True)
class Task:
    """One run, as a job of its own or as an element of an array."""

    run: str

    def __call__(self) -> None:
        if status := self.carry_out():
            sys.exit(status)

    def carry_out(self) -> int:
        """This node's part of the run; the exit status, which on other nodes than the first is 0."""
        import submitit

        here = submitit.JobEnvironment()
        config = load_config(RunDir(Path(self.run)).config)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        calls = Path(self.run) / "logs" / f"nodes_{here.job_id}.{restarts}.json"
        if here.node != 0:
            os.environ |= placement(config.cluster)
            for signum in STOP_SIGNALS:
                signal.signal(signum, signal.SIG_IGN)  # the first node says what is to be done
            locate_models(config)
            follow(
                Path(self.run),
                calls,
                node=here.node,
                num_nodes=here.num_nodes,
                num_ranks=hardware.ranks_per_node(config),
                use_gpus=hardware.gpus_per_node(config) > 0,
            )
            return 0
        head = Head(calls, num_nodes=here.num_nodes, address=address_of(here.hostnames) if here.num_nodes > 1 else "")
        try:
            return lead(RunDir(Path(self.run)), config, head, job_id=here.job_id, restarts=restarts)
        finally:
            head.end()


def lead(run: RunDir, config: Config, head: Head, *, job_id: str, restarts: int) -> int:
    """The run, from where it stands to its end; the job's exit status."""
    status, requeue, problem = 1, False, None
    try:
        with stop_signals(), run.lock(wait_s=LOCK_TIMEOUT_S):
            check_requeues(run, config, restarts=restarts)
            os.environ |= placement(config.cluster)
            locate_models(config)
            carry_out(job_of(run), run.unused_attempt(), console=Console(highlight=False, soft_wrap=True), head=head)
        outcome, status = read_outcome(run), 0
        requeue = outcome["state"] == "stopped" and outcome["reason"] == signal.SIGUSR2.name  # ranks alone heard it
    except Stopped as stopped:
        status, problem = 128 + stopped.signum, f"stopped by {stopped}"
        requeue = stopped.signum == signal.SIGUSR2 or was_preempted(job_id)
    except DistillError as error:
        status, problem = (2 if isinstance(error, ConfigError) else 1), str(error)
        print(*(f"error: {line}" for line in problem.splitlines()), sep="\n", flush=True)
    if requeue and restarts < config.cluster.max_requeues:
        print(f"job {job_id} is queued again", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ask("scontrol", "requeue", job_id)
        time.sleep(REQUEUE_S)  # Slurm ends this process
    elif requeue:
        print(f"cluster.max_requeues={config.cluster.max_requeues}: the job is not queued again", flush=True)
    write_json(run.slurm_end, {"job_id": job_id, "status": status, "error": problem})
    return status


def check_requeues(run: RunDir, config: Config, *, restarts: int) -> None:
    """Slurm counts starts after preemptions and lost nodes too, and has no limit of its own."""
    if restarts > config.cluster.max_requeues:
        raise DistillError(
            f"started again {restarts} times, more than cluster.max_requeues={config.cluster.max_requeues}; "
            f"distill resume {run.path} goes on"
        )


def was_preempted(job_id: str) -> bool:
    """Whether a job of higher priority is why this one was asked to end."""
    return re.search(r"PreemptTime=\d", ask("scontrol", "show", "job", "-o", job_id)) is not None
