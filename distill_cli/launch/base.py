"""Where the ranks of runs are started: on this machine, or on the nodes of a cluster, as jobs.

A launcher is a file of this folder with an object `LAUNCHER`; its own keys are the section `cluster.<name>`.

The first node's process of a job leads: it begins and ends each attempt, ships metrics and prints. The others start and
end their ranks at its commands, and write down how their ranks ended. The commands are one file, which is replaced
whole each time; a network file system may show it some seconds late, which only delays the others.
"""

import importlib
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from distill_cli.config.choices import nearest
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir, SubmittedJob, read_json, write_json
from distill_cli.resolved import ResolvedRun

LAUNCHERS = ("local", "slurm")
NODE_PROGRAM = "distill_cli.jobs.prepared_run"
"""A job executes `python -m NODE_PROGRAM RUN` on each of its nodes."""
POLL_S = 0.5
COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "/inductor", "TRITON_CACHE_DIR": "/triton", "VLLM_CACHE_ROOT": "/vllm"}
VARIABLES = {"hf_home": {"HF_HOME": ""}, "compile_cache": COMPILE_CACHES, "tmp_dir": {"TMPDIR": ""}}
"""Environment variables that each key of cluster.* sets, with the path inside the key's folder."""


@dataclass(frozen=True)
class Place:
    """A process's place among the nodes of a job."""

    job_id: str | None = None
    """None outside a job."""
    num_restarts: int = 0
    """How often the cluster has started the job again."""
    node: int = 0
    num_nodes: int = 1
    address: str = "localhost"
    """Where this node reaches the first one."""

    def torchrun_arguments(self, port: int) -> list[str]:
        """Return the arguments with which the agents of all nodes meet on a port of the first."""
        if self.num_nodes == 1:
            return ["--standalone"]
        where = [f"--master-addr={self.address}", f"--master-port={port}"]
        return [f"--nnodes={self.num_nodes}", f"--node-rank={self.node}", *where]

    def command_file(self, run: RunDir) -> Path:
        """Return the file in which the first node commands the others."""
        return run.path / "logs" / f"nodes_{self.job_id}.{self.num_restarts}.json"


ALONE = Place()


class Launcher:
    """A place where runs are started. The defaults are those of a launcher that submits nothing."""

    name: ClassVar[str]
    runs_here: ClassVar[bool] = False
    """Whether the typed command starts the ranks itself instead of submitting jobs."""
    unread: ClassVar[frozenset[str]] = frozenset()
    """Keys of cluster, outside of sections, that have no effect."""

    def resolve(self, config: Config) -> Config:
        """Fill in what the cluster decides, such as the GPUs of a node; nothing if the cluster does not answer."""
        return config

    def problems(self, config: Config, *, num_jobs: int = 1) -> Iterator[str]:
        """Yield what keeps the launcher from taking so many jobs of a resolved config."""
        yield from ()

    def script(self, resolved: ResolvedRun, *, folder: Path, num_jobs: int = 1) -> str:
        """Return what `submit` would give to the cluster, or the command that would run here."""
        raise NotImplementedError

    def submit(self, config: Config, runs: Sequence[RunDir], *, folder: Path) -> list[SubmittedJob]:
        """Queue a job for each prepared run, named after the run's or sweep's `folder`, which takes the output.

        Raises:
            ConfigError: the cluster refuses the jobs.
        """
        return []

    def hints(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return what to print about submitted jobs: `job`, and the commands `queue` and `cancel`."""
        return {}

    def is_installed(self) -> bool:
        """Return whether this machine can ask the cluster about jobs."""
        return False

    def status(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the state of each of these jobs that has not ended, in the cluster's terms."""
        return {}

    def end_state(self, job_id: str) -> str:
        """Return what became of a job that has ended; "" if the cluster does not know."""
        return ""

    def place(self) -> Place:
        """Return this process's place among the nodes of its job."""
        return ALONE

    def check_restarts(self, config: Config, place: Place) -> None:
        """Raise DistillError if the cluster has started this job too often."""

    def requeue(self, config: Config, place: Place, *, reason: str) -> None:
        """Queue this process's own job again, and do not return, if the cluster and not the user has stopped it.

        Args:
            reason: why the run stopped: the name of a signal, or of the key that set a limit.
        """

    def tags(self) -> dict[str, str]:
        """Return what trackers record about the job that this process is part of."""
        return {}

    def findings(self) -> list[tuple[str, bool, str, str]]:
        """Return lines of `distill doctor`: name, whether it is fine, detail, fix."""
        return []


def launcher_of(name: str) -> Launcher:
    """Return the launcher that cluster.launcher names. Raises ConfigError if there is none."""
    if name not in LAUNCHERS:
        what = f"no such launcher{nearest(name, LAUNCHERS)} (there are: {', '.join(LAUNCHERS)})"
        raise ConfigError(f"cluster.launcher={name}: {what}")
    launcher: Launcher = importlib.import_module(f"distill_cli.launch.{name}").LAUNCHER
    return launcher


@dataclass(frozen=True)
class Command:
    """A command of the first node to the others."""

    attempt: int = 0
    port: int = 0
    options: Sequence[str] = ()
    """Arguments of the ranks."""
    is_over: bool = False
    """End the attempt's ranks."""
    has_ended: bool = False
    """The job is over: exit."""


class Leader:
    """The first node's side; writes nothing if there is only one node."""

    def __init__(self, run: RunDir, place: Place) -> None:
        self.place = place
        self._file, self._command = place.command_file(run), Command()

    def begin(self, run: RunDir, options: Sequence[str]) -> int:
        """Let the others start their ranks; return the port on which all ranks meet."""
        port = free_port() if self.place.num_nodes > 1 else 0
        self._send(Command(run.attempt, port, options))
        return port

    def end_attempt(self) -> None:
        self._send(replace(self._command, is_over=True))

    def close(self) -> None:
        """Let the others exit."""
        self._send(replace(self._command, is_over=True, has_ended=True))

    def has_failed_node(self, run: RunDir) -> bool:
        """Return whether the ranks of another node have failed."""
        files = [run.node_status(node) for node in range(1, self.place.num_nodes)]
        return any(read_json(file)["status"] != 0 for file in files if file.exists())

    def _send(self, command: Command) -> None:
        self._command = command
        if self.place.num_nodes > 1:
            write_json(self._file, asdict(command))


def read_command(file: Path) -> Command:
    """Return the first node's last command; attempt 0 if there is none yet."""
    return Command(**read_json(file)) if file.exists() else Command()


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def node_variables(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables that cluster.* sets for a run's processes; make the folders on this node.

    Raises:
        ConfigError: a folder names a variable that the node does not have, or cannot be made.
    """
    env = {str(name): str(value) for name, value in cluster.env.items()}
    for key, variables in VARIABLES.items():
        if (text := getattr(cluster, key)) is not None:
            folder = make_folder(text, key)
            env |= {name: folder + part for name, part in variables.items()}
    return env


def make_folder(text: str, key: str) -> str:
    """Make the folder that `cluster.key` names, with the node's variables in it; return its absolute path."""
    path = Path(os.path.expandvars(text)).expanduser()
    if missing := re.search(r"\$\{?(\w+)", str(path)):
        raise ConfigError(f"cluster.{key}={text}: ${missing[1]} is not set here; set it, or name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"no folder can be made there ({error.strerror})"
        raise ConfigError(f"cluster.{key}={text}: {what}; choose another") from error
    return str(path.absolute())
