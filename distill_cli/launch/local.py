"""Ranks on this machine: one torchrun, watched until it ends, stopped whole when the user stops.

torchrun's agent starts every rank in a session of its own, so a signal to the agent's group does not reach them: its
descendants are ended by process id. Each rank also dies with its agent, and the agent with us (`die_with_parent`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from distill_cli.errors import ConfigError, DistillError
from distill_cli.processes import describe_exit, die_with_parent
from distill_cli.rundir import RunDir

GRACE_S = 3.0
"""Between asking the ranks to end and killing them."""


class Stopped(BaseException):
    """The user or the system asked the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def command(run: RunDir, *, num_ranks: int) -> list[str]:
    """What starts the ranks of a run on this machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"),
        *("--max-restarts=0", "-m", "distill_cli.worker", str(run.path)),
    ]


def launch(run: RunDir, *, num_ranks: int, use_gpus: bool) -> None:
    """Runs the ranks to their end.

    Raises:
        DistillError: a rank failed; its own error in one line, and the path of its log.
        ConfigError: a rank found the input wrong.
        Stopped: SIGINT or SIGTERM came; every process is gone.
    """
    with (run.logs() / "torchrun.log").open("wb") as log, stop_signals():
        process = subprocess.Popen(
            command(run, num_ranks=num_ranks),
            stderr=log,
            env=environment(num_ranks=num_ranks, use_gpus=use_gpus),
            start_new_session=True,  # Ctrl-C reaches us alone, and we end the ranks
            preexec_fn=die_with_parent,
        )
        try:
            status = process.wait()
        finally:
            end_tree(process)
    if status != 0:
        raise failure(run, num_ranks=num_ranks, status=status)


def environment(*, num_ranks: int, use_gpus: bool) -> dict[str, str]:
    """The ranks' environment: the CPU's threads shared out, no GPU where none is to be used."""
    env = dict(os.environ)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning make a step twenty times slower as soon as anything else wants a core.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not use_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` inside; a second one does nothing more."""
    raised = False

    def stop(signum: int, _frame: object) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_tree(process: subprocess.Popen) -> None:
    """Ends the agent and everything that came of it: first asked, then killed."""
    try:
        agent = psutil.Process(process.pid)
        tree = [*agent.children(recursive=True), agent]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_S)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)
    process.wait()


def failure(run: RunDir, *, num_ranks: int, status: int) -> DistillError:
    """The first failed rank's own error in one line, and the path of its log."""
    errors = [_read_error(run.rank_error(rank), rank) for rank in range(num_ranks)]
    errors = sorted((error for error in errors if error), key=lambda error: error["time"])
    torchrun_log = run.logs() / "torchrun.log"
    killed = re.search(r"failed \(exitcode: (-\d+)\) local_rank: (\d+)", torchrun_log.read_text(errors="replace"))
    if killed and not errors:
        rank = int(killed[2])
        return DistillError(f"rank {rank} {describe_exit(int(killed[1]))}; log: {run.rank_log(rank)}")
    if errors and errors[0].get("is_config"):
        return ConfigError(errors[0]["message"])
    if errors:
        first = errors[0]
        return DistillError(f"rank {first['rank']}: {first['message']}; log: {run.rank_log(first['rank'])}")
    return DistillError(f"torchrun ended with status {status}; log: {torchrun_log}")


def _read_error(file: Path, rank: int) -> dict | None:
    try:
        return {"rank": rank, **json.loads(file.read_text())}
    except (FileNotFoundError, json.JSONDecodeError):
        return None
