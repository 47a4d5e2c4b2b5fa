"""Ranks on this machine: one torchrun, watched until it ends, stopped whole when the user stops.

torchrun's agent starts every rank in a session of its own, so a signal to the agent's group does not reach them: its
descendants are ended by process id. Each rank also dies with its agent, and the agent with us (`die_with_parent`).
The agent ignores the signals that ask a run to stop, which a scheduler sends to every process: it would end its ranks
before they have saved.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, DistillError, Killed, Stopped, Unrecoverable
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.launch.base import Launcher
from distill_cli.launch.node_paths import node_variables
from distill_cli.launch.nodes import ALONE, POLL_S, Command, Leader, Place, read_command
from distill_cli.machine import hardware
from distill_cli.machine.processes import LAUNCHER_PID, describe_exit, die_with_parent
from distill_cli.machine.torch_versions import torchrun_knows
from distill_cli.models.model_files import CACHE_ONLY

GRACE_S = 3.0
"""Between asking the ranks to end and killing them."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Ctrl-C; how a system or scheduler ends a process; a scheduler's warnings; a closed terminal."""


class Local(Launcher):
    """This machine."""

    name = "local"
    runs_here = True
    unread = frozenset({"wait"})

    def problems(self, config: Config, *, num_jobs: int = 1) -> Iterator[str]:
        if config.cluster.nodes != 1:
            yield f"cluster.nodes={config.cluster.nodes}: cluster.launcher=local is one machine; choose cluster=slurm"

    def script(self, config: Config, *, folder: Path, num_jobs: int = 1) -> str:
        return shlex.join(command(RunDir(folder), num_ranks=hardware.ranks_per_node(config)))


LAUNCHER = Local()


def command(
    run: RunDir,
    *,
    num_ranks: int,
    checkpoint: Path | str | None = None,
    check: bool = False,
    place: Place = ALONE,
    port: int = 0,
) -> list[str]:
    """Return what starts the ranks of a run on this machine."""
    return [
        *(sys.executable, "-m", "distill_cli.launch.agent", str(run.path), str(run.attempt)),
        *(*place.torchrun_arguments(port), f"--nproc-per-node={num_ranks}"),
        *("--max-restarts=0", "--signals-to-handle=SIGINT"),
        # Without it torchrun waits 30 s for each rank that is asked to end; `end_tree` does not.
        *([f"--shutdown-timeout={GRACE_S:.0f}"] if torchrun_knows("--shutdown-timeout") else []),
        *("-m", "distill_cli.ranks.worker", str(run.path), f"--attempt={run.attempt}"),
        *([f"--checkpoint={checkpoint}"] if checkpoint else []),
        *(["--check"] if check else []),
    ]


def start_ranks(
    config: Config, run: RunDir, *, checkpoint: Path | None = None, check: bool = False, leader: Leader | None = None
) -> None:
    """Run the ranks to their end, those of other nodes included.

    Args:
        checkpoint: where they go on from.
        check: look whether all is as it should be (`distill check`), instead of training.
        leader: commands the other nodes of the job; None outside a job.

    Raises:
        ConfigError: a rank found the input wrong.
        Killed: a rank was killed, or none got on for cluster.hang_timeout_s.
        DistillError: a rank failed; its own error in one line, and the path of its log.
        Stopped: one of `STOP_SIGNALS` came. The ranks had cluster.grace_s to save; every process is gone.
    """
    leader = leader or Leader(run, ALONE)
    num_ranks, num_nodes = hardware.ranks_per_node(config), leader.place.num_nodes
    with stop_signals():
        port = leader.begin(run, checkpoint=checkpoint)
        argv = command(run, num_ranks=num_ranks, checkpoint=checkpoint, check=check, place=leader.place, port=port)
        process = start(argv, run.torchrun_log(0), env=environment(config))
        try:
            status = wait(process, run, hang_timeout_s=config.cluster.hang_timeout_s, leader=leader)
        except Stopped:
            ask_to_stop(process, run, grace_s=config.cluster.grace_s)
            raise
        finally:
            leader.end_attempt()
            end_tree(process)
    if status != 0:
        raise failure(run, num_ranks=num_ranks, status=status, num_nodes=num_nodes)


def follow(config: Config, run: RunDir, place: Place) -> None:
    """Start and end the ranks of a node that is not the first, as the first commands, until the job has ended."""
    commands, last = place.command_file(run), Command()
    while not (now := read_command(commands)).has_ended:
        if now.is_over or now.attempt == last.attempt:
            time.sleep(POLL_S)
            continue
        last, run = now, RunDir(run.path, attempt=now.attempt)
        argv = command(
            run,
            num_ranks=hardware.ranks_per_node(config),
            checkpoint=now.checkpoint,
            place=place,
            port=now.port,
        )
        process = start(argv, run.torchrun_log(place.node), env=environment(config))
        try:
            while process.poll() is None and read_command(commands) == now:
                time.sleep(POLL_S)
            write_json(run.node_status(place.node), {"status": process.returncode or 0})
        finally:
            end_tree(process)


def start(argv: Sequence[str], log_file: Path, *, env: Mapping[str, str]) -> subprocess.Popen:
    """Start this node's torchrun."""
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


def wait(process: subprocess.Popen, run: RunDir, *, hang_timeout_s: float, leader: Leader) -> int:
    """Return the agent's exit status; raise Killed if the main rank has been in one stage for too long."""
    begin = time.time()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        if leader.failed_node(run) is not None:
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
    """Let the ranks save a checkpoint and end; a second signal, or the end of the grace, ends the wait.

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


def environment(config: Config) -> dict[str, str]:
    """Return the ranks' environment: ours, what cluster.* sets, the CPU's threads shared out, no GPU on CPU ranks.

    Raises:
        ConfigError: a folder of cluster.* cannot be made here.
    """
    env = {**os.environ, **node_variables(config.cluster), CACHE_ONLY: "1", LAUNCHER_PID: str(os.getpid())}
    threads = max(1, len(os.sched_getaffinity(0)) // hardware.ranks_per_node(config))
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning make a step twenty times slower as soon as anything else wants a core.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not hardware.gpus_per_node(config):
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` inside at the first of `STOP_SIGNALS`, except those that nohup ignores; later ones do nothing."""
    raised = False

    def stop(signum: int, _frame: object) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Stopped(signum)

    handled = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in handled}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_tree(process: subprocess.Popen) -> None:
    """End the agent and all its descendants: ask first, then kill."""
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
