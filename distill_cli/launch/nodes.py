"""The nodes of a job: where their ranks keep files, and the file through which the first node starts and stops all.

The first node's process of a job leads: it begins and ends each attempt, ships metrics and prints. The others start and
end their ranks at its commands, and write down how their ranks ended. The commands are one file, which is replaced
whole each time; a network file system may show it some seconds late, which only delays the others.
"""

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.launch.base import Place

POLL_S = 0.5
COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "/inductor", "TRITON_CACHE_DIR": "/triton", "VLLM_CACHE_ROOT": "/vllm"}
VARIABLES = {"hf_home": {"HF_HOME": ""}, "compile_cache": COMPILE_CACHES, "tmp_dir": {"TMPDIR": ""}}
"""Environment variables that each key of cluster.* sets, with the path inside the key's folder."""


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
