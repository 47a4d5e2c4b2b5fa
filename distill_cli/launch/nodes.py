"""The nodes of a run, and how they act together: through one file, which the first writes and the others read.

The first node's process leads: it begins and ends each attempt, ships metrics and prints. The others start their ranks
when it says so, end them when it says so, and leave behind how their ranks ended. The file is replaced whole each time;
a network file system may show it some seconds late, which costs just that.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distill_cli.folders.run_dir import RunDir, write_json

POLL_S = 0.5


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of an attempt meet: on a port of the first node."""

    num_nodes: int = 1
    node: int = 0
    """This one's place among them."""
    address: str = "localhost"
    port: int = 0

    def arguments(self) -> list[str]:
        """torchrun's."""
        if self.num_nodes == 1:
            return ["--standalone"]
        return [
            *(f"--nnodes={self.num_nodes}", f"--node-rank={self.node}"),
            *(f"--master-addr={self.address}", f"--master-port={self.port}"),
        ]


@dataclass(frozen=True)
class Call:
    """What the first node has said last."""

    attempt: int
    address: str
    port: int
    checkpoint: str | None
    is_over: bool = False
    """The attempt: whatever still runs of it is to be ended."""
    has_ended: bool = False
    """The job: there is nothing more to do."""


class Head:
    """The first node's side. Without others, nothing is written and nobody is heard."""

    def __init__(self, file: Path | None = None, *, num_nodes: int = 1, address: str = "localhost") -> None:
        self.num_nodes = num_nodes
        self._file, self._address = file, address
        self._call: Call | None = None

    def begin(self, run: RunDir, *, checkpoint: Path | None) -> Rendezvous:
        """Lets the others start their ranks; where all ranks meet."""
        if self.num_nodes == 1:
            return Rendezvous()
        rendezvous = Rendezvous(self.num_nodes, 0, self._address, free_port())
        start = str(checkpoint) if checkpoint else None
        self._say(Call(run.attempt, rendezvous.address, rendezvous.port, start))
        return rendezvous

    def end_attempt(self) -> None:
        if self._call is not None:
            self._say(Call(**asdict(self._call) | {"is_over": True}))

    def end(self) -> None:
        """Lets the others go."""
        if self.num_nodes > 1:
            last = asdict(self._call) if self._call else {"attempt": 0, "address": "", "port": 0, "checkpoint": None}
            self._say(Call(**last | {"is_over": True, "has_ended": True}))

    def failed_node(self, run: RunDir) -> int | None:
        """One whose ranks have ended badly, if any."""
        for node in range(1, self.num_nodes):
            with contextlib.suppress(FileNotFoundError):
                if json.loads(run.node_status(node).read_text())["status"] != 0:
                    return node
        return None

    def _say(self, call: Call) -> None:
        self._call = call
        write_json(self._file, asdict(call))


def read_call(file: Path) -> Call | None:
    """None where the first node has said nothing yet."""
    try:
        return Call(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None


def free_port() -> int:
    """A port of this machine that nobody listens on, for long enough to start listening."""
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def address_of(hosts: Sequence[str]) -> str:
    """The first node's, as the others reach it: its name where it resolves, else what Slurm knows it by."""
    try:
        socket.getaddrinfo(hosts[0], None)
        return hosts[0]
    except socket.gaierror:
        shown = subprocess.run(["scontrol", "show", "node", "-o", hosts[0]], capture_output=True, text=True, check=True)
        return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)["NodeAddr"]
