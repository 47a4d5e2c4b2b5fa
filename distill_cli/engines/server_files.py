"""The files in which the servers of a teacher's job say where they are: one for each node, in a folder of the run.

A server writes its file when it listens, while its model may still be loading, and removes it when it stops. One that
is killed leaves it behind: nothing answers there, and the next server of that node replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from distill_cli.folders.run_dir import write_json


@dataclass(frozen=True)
class Server:
    """Where a server is reached, and how it is recognized."""

    address: str
    certificate: str
    """PEM; its own, which clients trust at no other address than those it names."""
    job_id: str | None = None


Find = Callable[[], list[Server]]
"""Returns the servers that there are now."""


def server_file(folder: Path, node: int) -> Path:
    """Return the file of the server on a node of the teacher's job."""
    return folder / f"server_{node}.json"


def write_server(file: Path, server: Server) -> None:
    """Write the file completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(server))


def read_servers(folder: Path) -> list[Server]:
    """Return the servers by node; without those whose file cannot be read, which may have been removed meanwhile."""
    found = []
    for file in sorted(folder.glob("server_*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Server(**json.loads(file.read_text())))
    return found


def remove_servers(folder: Path) -> None:
    """Remove the files that killed servers have left."""
    for file in folder.glob("server_*.json"):
        file.unlink(missing_ok=True)


def finder(folder: Path) -> Find:
    """Return what reads a folder's servers anew at each call."""
    return partial(read_servers, folder)
