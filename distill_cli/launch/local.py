"""A node's ranks: one torchrun, watched until it ends, stopped whole when the user stops.

torchrun's agent starts every rank in a session of its own, so a signal to the agent's group does not reach them: its
descendants are ended by process id. Each rank also dies with its agent, and the agent with us (`die_with_parent`).
The agent ignores what asks a run to stop, which a scheduler sends to every process: it would end its ranks at once,
and they are to save first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from distill_cli.errors import ConfigError, DistillError, Killed, Unrecoverable
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.launch.nodes import POLL_S, Head, Rendezvous, read_call
from distill_cli.machine.processes import LAUNCHER, describe_exit, die_with_parent
from distill_cli.machine.torch_versions import torchrun_knows
from distill_cli.models.model_files import CACHE_ONLY

GRACE_S = 3.0
"""Between asking the ranks to end and killing them."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Ctrl-C; what a system or scheduler ends a process with; a scheduler's warnings; a terminal that is gone."""

ALONE = Rendezvous()


class Stopped(BaseException):
    """The user or the system asked the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def command(
    run: RunDir,
    *,
    num_ranks: int,
    checkpoint: Path | None = None,
    check: bool = False,
    rendezvous: Rendezvous = ALONE,
) -> list[str]:
    """What starts the ranks of a run on this machine."""
    return [
        *(sys.executable, "-m", "distill_cli.launch.agent", str(run.path), str(run.attempt)),
        *(*rendezvous.arguments(), f"--nproc-per-node={num_ranks}"),
        *("--max-restarts=0", "--signals-to-handle=SIGINT"),
        # Without it torchrun waits 30 s for each rank that is asked to end; `end_tree` does not.
        *([f"--shutdown-timeout={GRACE_S:.0f}"] if torchrun_knows("--shutdown-timeout") else []),
        *("-m", "distill_cli.ranks.worker", str(run.path), f"--attempt={run.attempt}"),
        *([f"--checkpoint={checkpoint}"] if checkpoint else []),
        *(["--check"] if check else []),
    ]


def launch(
    run: RunDir,
    *,
    num_ranks: int,
    use_gpus: bool,
    checkpoint: Path | None = None,
    check: bool = False,
    hang_timeout_s: float = 0.0,
    grace_s: float = 60.0,
    head: Head | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Runs the ranks to their end, those of other nodes included.

    Args:
        num_ranks: of each node.
        checkpoint: where they go on from.
        check: they look whether all is as it should be (`distill check`), instead of training.
        hang_timeout_s: how long a stage of a step may take; 0 is for ever.
        grace_s: how long the ranks may take to save a checkpoint when they are asked to stop.
        head: speaks with the run's other nodes; None where there are none.
        env: variables that the ranks get besides this process' own.

    Raises:
        ConfigError: a rank found the input wrong.
        Killed: a rank was killed, or none got on.
        DistillError: a rank failed; its own error in one line, and the path of its log.
        Stopped: one of `STOP_SIGNALS` came; every process is gone.
    """
    head = head or Head()
    with stop_signals():
        rendezvous = head.begin(run, checkpoint=checkpoint)
        argv = command(run, num_ranks=num_ranks, checkpoint=checkpoint, check=check, rendezvous=rendezvous)
        process = start(
            argv, run.torchrun_log(0), env=environment(num_ranks=num_ranks, use_gpus=use_gpus, extra=env or {})
        )
        try:
            status = wait(process, run, hang_timeout_s=hang_timeout_s, head=head)
        except Stopped:
            ask_to_stop(process, run, grace_s=grace_s)
            raise
        finally:
            head.end_attempt()
            end_tree(process)
    if status != 0:
        raise failure(run, num_ranks=num_ranks, status=status, num_nodes=head.num_nodes)


def follow(path: Path, calls: Path, *, node: int, num_nodes: int, num_ranks: int, use_gpus: bool) -> None:
    """Another node's side of a run: starts and ends its ranks as the first node says, until that has ended.

    Args:
        path: the run's folder.
        calls: the file that the first node writes.
    """
    done = 0
    while (call := read_call(calls)) is None or not call.has_ended:
        if call is None or call.is_over or call.attempt == done:
            time.sleep(POLL_S)
            continue
        done, run = call.attempt, RunDir(path, attempt=call.attempt)
        argv = command(
            run,
            num_ranks=num_ranks,
            checkpoint=Path(call.checkpoint) if call.checkpoint else None,
            rendezvous=Rendezvous(num_nodes, node, call.address, call.port),
        )
        process = start(argv, run.torchrun_log(node), env=environment(num_ranks=num_ranks, use_gpus=use_gpus, extra={}))
        try:
            while process.poll() is None and read_call(calls) == call:
                time.sleep(POLL_S)
            write_json(run.node_status(node), {"status": process.returncode or 0})
        finally:
            end_tree(process)


def start(argv: Sequence[str], log_file: Path, *, env: Mapping[str, str]) -> subprocess.Popen:
    """This node's torchrun."""
    with log_file.open("wb") as log:
        return subprocess.Popen(
            argv,
            stderr=log,
            env=env,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end the ranks
            preexec_fn=partial(_prepare_agent, launcher=os.getpid()),
        )


def _prepare_agent(*, launcher: int) -> None:
    die_with_parent(parent=launcher)
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait(process: subprocess.Popen, run: RunDir, *, hang_timeout_s: float, head: Head) -> int:
    """The agent's exit status; raises Killed where the main rank has been in one stage for too long."""
    begin = time.time()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        if head.failed_node(run) is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)  # its own ranks may have more to say
            return process.returncode or 1
        last_sign = max(begin, run.heartbeat.stat().st_mtime) if run.heartbeat.exists() else begin
        if hang_timeout_s and time.time() - last_sign > hang_timeout_s:
            raise Killed(
                f"the ranks have been in one stage for cluster.hang_timeout_s={hang_timeout_s:g} s and are taken for "
                f"hung; log: {run.rank_log(0)}"
            )


def ask_to_stop(process: subprocess.Popen, run: RunDir, *, grace_s: float) -> None:
    """Lets the ranks save a checkpoint and end; a second signal, or the end of the grace, ends the wait.

    The ranks are the agent's children. Before the first heartbeat there is nothing to save.
    """
    if not run.heartbeat.exists():
        return
    with suppress(psutil.NoSuchProcess):
        for rank in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)
    with suppress(Stopped, subprocess.TimeoutExpired), stop_signals():
        process.wait(timeout=grace_s)


def environment(*, num_ranks: int, use_gpus: bool, extra: Mapping[str, str]) -> dict[str, str]:
    """The ranks' environment: ours and `extra`, the CPU's threads shared out, no GPU where none is to be used."""
    env = {**os.environ, **extra, CACHE_ONLY: "1", LAUNCHER: str(os.getpid())}
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
    """`STOP_SIGNALS` raise `Stopped` inside; a second one does nothing more. Those that nohup has ignored stay so."""
    raised = False

    def stop(signum: int, _frame: object) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Stopped(signum)

    heeded = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in heeded}
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


def failure(run: RunDir, *, num_ranks: int, status: int, num_nodes: int = 1) -> DistillError:
    """What went wrong first, in one line, and the path of its log.

    A rank that was killed comes before the errors of those that waited for it.
    """
    errors = [_read_error(run.rank_error(rank), rank) for rank in range(num_nodes * num_ranks)]
    errors = sorted((error for error in errors if error), key=lambda error: error["time"])
    if not errors:
        kind = Killed if status < 0 else DistillError
        return kind(f"torchrun {describe_exit(status)}; log: {run.torchrun_log(0)}")
    first = errors[0]
    if first.get("kind") == "ConfigError":
        return ConfigError(first["message"])
    kinds = {"Killed": Killed, "Unrecoverable": Unrecoverable}
    kind = kinds.get(first.get("kind"), DistillError)
    what = f" {describe_exit(first['status'])}" if "status" in first else f": {first['message']}"
    return kind(f"rank {first['rank']}{what}; log: {run.rank_log(first['rank'])}")


def _read_error(file: Path, rank: int) -> dict | None:
    try:
        return {"rank": rank, **json.loads(file.read_text())}
    except (FileNotFoundError, json.JSONDecodeError):
        return None
