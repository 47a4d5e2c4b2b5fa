"""The nodes of a job, and how they act together: through one file, which the first writes and the others read.

The first node's process leads: it begins and ends each attempt, ships metrics and prints. The others start and end
their ranks at its commands, and write down how their ranks ended. The file is replaced whole each time; a network file
system may show it some seconds late, which only delays the others.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distill_cli.folders.run_dir import RunDir, read_json, write_json

POLL_S = 0.5


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

    def end(self) -> None:
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
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])
