"""Start ranks on this machine with torchrun, watch it, and end all its processes on a stop signal.

Every rank is in a session of its own, so a signal to the agent's group does not reach it: the agent's descendants are
ended by process id. Each rank also dies with its agent, and the agent with us (`die_with_parent`). The agent ignores
the signals that ask a run to stop, which a scheduler sends to every process: it would end its ranks before they have
saved.

torchrun's agent is this file: `python -m distill_cli.launch.local RUN ATTEMPT [--fork=N] <torchrun's arguments>`.
Ranks on CPUs are forked from it (`forked_ranks`). A rank that raises writes `rank_<n>.error.json` itself. One that is
killed cannot, and only the process that torchrun runs in learns its exit status. The ranks' errors are not written by
torch's `@record`: it needs torch before their output is redirected, and its times are whole seconds, within which
several ranks may fail.
"""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil

from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, DistillError, Killed, Stopped, TeacherLost, Unrecoverable
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.launch.base import ALONE, Launcher, Place
from distill_cli.launch.forked_ranks import fork_ranks
from distill_cli.launch.nodes import POLL_S, Command, Leader, node_variables, read_command
from distill_cli.machine.hardware import threads_of_rank
from distill_cli.machine.processes import LAUNCHER_PID, describe_exit, die_with_parent
from distill_cli.machine.torch_versions import torchrun_knows
from distill_cli.models.model_files import CACHE_ONLY
from distill_cli.resolved import ResolvedRun

FORK = "--fork="
"""The agent's argument with which it forks so many ranks itself."""
GRACE_S = 3.0
"""Between asking the ranks to end and killing them."""

SHORT_SPIN = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Threads wait by spinning for microseconds, then asleep. Without spinning small operators on two threads take twice as
long; by default they spin for so long that a step is twenty times slower as soon as anything else wants a core."""
KEPT_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the most that glibc takes
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_ARENA_MAX": "1",  # else each thread that saves a checkpoint may leave its buffers behind in another heap
    # Else the heap grows by a tenth in 500 steps (docs/performance.md, "Memory over time").
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # of kernels, one for each number of tokens; by default 1,024
}
"""Lets glibc keep what an operator's tensors leave for the next ones, and nothing else be kept. By default every tensor
of megabytes is memory that the kernel hands out page by page and takes back, an eighth of a small model's training step
on CPUs; and oneDNN's kernels take half a megabyte more with each step."""

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

    def script(self, resolved: ResolvedRun, *, folder: Path, num_jobs: int = 1) -> str:
        ranks = resolved.ranks
        return shlex.join(command(RunDir(folder), num_ranks=ranks.per_node, forks=not ranks.on_gpus))


LAUNCHER = Local()


def command(
    run: RunDir, options: Sequence[str] = (), *, num_ranks: int, forks: bool, place: Place = ALONE, port: int = 0
) -> list[str]:
    """Return the command that starts a run's ranks on this machine.

    Args:
        options: arguments of the ranks.
        forks: fork the ranks from the agent, see `forked_ranks`. Linux only.
    """
    return [
        *(sys.executable, "-m", "distill_cli.launch.local", str(run.path), str(run.attempt)),
        *([f"{FORK}{num_ranks}"] if forks and sys.platform == "linux" else []),
        *(*place.torchrun_arguments(port), f"--nproc-per-node={num_ranks}"),
        *("--max-restarts=0", "--signals-to-handle=SIGINT"),
        # Without it torchrun waits 30 s for each rank that must end; `end_tree` does not.
        *([f"--shutdown-timeout={GRACE_S:.0f}"] if torchrun_knows("--shutdown-timeout") else []),
        *("-m", "distill_cli.ranks.worker", str(run.path), f"--attempt={run.attempt}", *options),
    ]


def start_ranks(
    resolved: ResolvedRun, run: RunDir, options: Sequence[str] = (), *, leader: Leader | None = None
) -> None:
    """Run the ranks to their end, those of other nodes included.

    Args:
        options: arguments of the ranks (`ranks.worker`): `--checkpoint=<path>` resumes from there, `--check` checks
            models and engines instead of training.
        leader: commands the other nodes of the job; None outside a job.

    Raises:
        ConfigError: a rank refused the input.
        Killed: a rank was killed, or stayed in one stage for cluster.hang_timeout_s.
        DistillError: a rank failed; its own error in one line, and the path of its log.
        Stopped: one of `STOP_SIGNALS` came. The ranks had cluster.grace_s to save; every process is gone.
    """
    leader, cluster = leader or Leader(run, ALONE), resolved.config.cluster
    with stop_signals():
        port = leader.begin(run, options)
        agent = start_agent(resolved, run, options, place=leader.place, port=port)
        try:
            status = wait(agent, run, hang_timeout_s=cluster.hang_timeout_s, leader=leader)
        except Stopped:
            ask_to_stop(agent, run, grace_s=cluster.grace_s)
            raise
        finally:
            leader.end_attempt()
            end_tree(agent)
    if status != 0:
        raise failure(run, status=status)


def follow(resolved: ResolvedRun, run: RunDir, place: Place) -> None:
    """Start and end the ranks of a node that is not the first, as the first commands, until the job has ended."""
    commands, last = place.command_file(run), Command()
    while not (now := read_command(commands)).has_ended:
        if now.is_over or now.attempt == last.attempt:
            time.sleep(POLL_S)
            continue
        last, run = now, RunDir(run.path, attempt=now.attempt)
        agent = start_agent(resolved, run, now.options, place=place, port=now.port)
        try:
            while agent.poll() is None and read_command(commands) == now:
                time.sleep(POLL_S)
            write_json(run.node_status(place.node), {"status": agent.returncode or 0})
        finally:
            end_tree(agent)


def start_agent(
    resolved: ResolvedRun, run: RunDir, options: Sequence[str], *, place: Place, port: int
) -> subprocess.Popen[bytes]:
    """Start this node's torchrun."""
    ranks = resolved.ranks
    argv = command(run, options, num_ranks=ranks.per_node, forks=not ranks.on_gpus, place=place, port=port)
    env, begin = environment(resolved), partial(_prepare_agent, launcher=os.getpid())
    with run.torchrun_log(place.node).open("wb") as log:
        # In a session of its own: Ctrl-C reaches us alone, and we end the ranks.
        return subprocess.Popen(argv, stderr=log, env=env, start_new_session=True, preexec_fn=begin)


def _prepare_agent(*, launcher: int) -> None:
    die_with_parent(parent=launcher)
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait(agent: subprocess.Popen[bytes], run: RunDir, *, hang_timeout_s: float, leader: Leader) -> int:
    """Return the agent's exit status; raise Killed if the main rank stays in one stage for too long."""
    begin = time.time()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return agent.wait(timeout=1.0)
        if leader.has_failed_node(run):
            with suppress(subprocess.TimeoutExpired):
                agent.wait(timeout=GRACE_S)  # lets its own ranks write their errors
            return agent.returncode or 1
        last_sign = max(begin, run.heartbeat.stat().st_mtime) if run.heartbeat.exists() else begin
        if hang_timeout_s and time.time() - last_sign > hang_timeout_s:
            what = f"the ranks have been in one stage for cluster.hang_timeout_s={hang_timeout_s:g} s"
            raise Killed(f"{what} and are taken for hung; log: {run.rank_log(0)}")


def ask_to_stop(agent: subprocess.Popen[bytes], run: RunDir, *, grace_s: float) -> None:
    """Let the ranks save a checkpoint and end; a second signal, or the end of the grace, ends the wait.

    The ranks are the agent's children. Before the first heartbeat there is nothing to save.
    """
    if not run.heartbeat.exists():
        return
    with suppress(psutil.NoSuchProcess):
        for rank in psutil.Process(agent.pid).children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)
    with suppress(Stopped, subprocess.TimeoutExpired), stop_signals():
        agent.wait(timeout=grace_s)


def environment(resolved: ResolvedRun) -> dict[str, str]:
    """Return the ranks' environment: ours, what cluster.* sets, the CPU's threads shared out, no GPU on CPU ranks.

    Raises:
        ConfigError: a folder of cluster.* cannot be made here.
    """
    cluster, ranks = resolved.config.cluster, resolved.ranks
    threads = {"OMP_NUM_THREADS": str(threads_of_rank(ranks.per_node))}
    defaults = {**SHORT_SPIN, **({} if ranks.on_gpus else KEPT_MEMORY), "TOKENIZERS_PARALLELISM": "false"}
    env = {**defaults, **os.environ, **threads, **bytecode_variables(), **node_variables(cluster)}
    env |= {CACHE_ONLY: "1", LAUNCHER_PID: str(os.getpid())}
    return env if ranks.on_gpus else env | {"CUDA_VISIBLE_DEVICES": ""}


def bytecode_variables() -> dict[str, str]:
    """Return what lets ranks keep bytecode in the user's cache, if the installed torch has none and Python writes none.

    Compiling its six thousand modules takes each process 15 s: images that set PYTHONDONTWRITEBYTECODE may have none.
    """
    torch = importlib.util.find_spec("torch")  # imports nothing
    if not sys.dont_write_bytecode or torch is None or torch.origin is None:
        return {}
    if Path(importlib.util.cache_from_source(torch.origin)).exists():
        return {}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distill" / "bytecode"
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}


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


def end_tree(agent: subprocess.Popen[bytes]) -> None:
    """End the agent and all its descendants: ask first, then kill."""
    tree: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(agent.pid)
        tree = [*root.children(recursive=True), root]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for member in tree:
            with suppress(psutil.NoSuchProcess):
                end(member)
        _, tree = psutil.wait_procs(tree, timeout=GRACE_S)
    agent.wait()


def failure(run: RunDir, *, status: int) -> DistillError:
    """Return what went wrong first, in one line, with the path of its log.

    A rank that was killed comes before the errors of those that waited for it. Of several ranks with the same error the
    lowest is named, whichever was first.
    """
    errors = []
    for file in run.logs.glob("rank_*.error.json"):
        with suppress(json.JSONDecodeError):
            rank = int(file.name.removeprefix("rank_").split(".")[0])
            errors.append({"rank": rank, "kind": "", **json.loads(file.read_text())})
    if not errors:
        lost = Killed if status < 0 else DistillError
        return lost(f"torchrun {describe_exit(status)}; log: {run.torchrun_log(0)}")
    what_first = min(errors, key=lambda error: (error["time"], error["rank"])).get("message")
    alike = (error for error in errors if error.get("message") == what_first)
    first = min(alike, key=lambda error: error["rank"])
    if first["kind"] == "ConfigError":
        return ConfigError(first["message"])
    kinds: dict[str, type[DistillError]] = {
        "Killed": Killed,
        "TeacherLost": TeacherLost,
        "Unrecoverable": Unrecoverable,
    }
    what = f" {describe_exit(first['status'])}" if "status" in first else f": {first['message']}"
    text = f"rank {first['rank']}{what}; log: {run.rank_log(first['rank'])}"
    return kinds.get(first["kind"], DistillError)(text)


def leave(status: int) -> NoReturn:
    """Exit without the interpreter's own end, which takes a second to free what the agent imported for its ranks."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def run_agent() -> None:
    """Run torchrun; name the ranks that were killed."""
    path, attempt, *arguments = sys.argv[1:]
    if arguments[0].startswith(FORK):
        fork_ranks(arguments, num_ranks=int(arguments.pop(0).removeprefix(FORK)))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        record_killed(error.failures, RunDir(Path(path), attempt=int(attempt)))
        raise


def record_killed(failures: Mapping[int, Any], run: RunDir) -> None:
    """Write an error file for each rank that was killed, but not by torchrun.

    After the first failure torchrun sends SIGTERM to the other ranks, and SIGKILL 30 s later.

    Args:
        failures: torch's `ProcessFailure` of each rank that did not exit with status 0.
    """
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        by_torchrun = failure.exitcode == -signal.SIGTERM or failure.timestamp > first + GRACE_S
        if failure.exitcode < 0 and not by_torchrun:
            # Time 0 sorts it before the errors of ranks that waited for it.
            write_json(run.rank_error(rank), {"time": 0.0, "kind": "Killed", "status": failure.exitcode})


if __name__ == "__main__":
    try:
        run_agent()
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)
