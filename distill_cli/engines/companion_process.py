"""The program of a companion, a teacher in a process of its own, and how it is started and ends. No torch at first.

python -m distill_cli.engines.companion_process SOCKET PARENT
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import IO

from distill_cli.engines.process_setup import import_transformers, prepare_process
from distill_cli.errors import DistillError, Killed
from distill_cli.machine.processes import describe_exit, die_with_parent
from distill_cli.terminal.step_printer import log_to

EXIT_S = 10.0
"""How long a companion that closed its socket may take to exit."""
STORE_FILE = "DISTILL_COMPANION_STORE"
"""Environment variable of a scoring server's companions: the file at which those of one engine meet."""


def main() -> None:
    """Serve the process with id PARENT over the inherited socket SOCKET until it is gone."""
    die_with_parent(parent=int(sys.argv[2]))
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the parent handles them: it may finish a step and save first
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else a child would hold the socket open after this process died
    log_to(sys.stderr)
    prepare_process()  # before torch
    import_transformers()
    from distill_cli.engines.companion import serve

    serve(Connection(descriptor))


def start_process(
    variables: Mapping[str, str], *, output: IO[bytes] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a companion with these environment variables added; return it and this end of the socket to it.

    It ends with the thread that calls this.

    Args:
        output: a file for what it prints; None is where this process prints.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "distill_cli.engines.companion_process", str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, **variables},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return process, Connection(ours.detach())


def death_of(process: subprocess.Popen[bytes], who: str) -> DistillError:
    """Return how a companion ended that has closed its socket; `who` begins the message."""
    try:
        status = process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        return Killed(f"{who} does not answer")
    return (Killed if status < 0 else DistillError)(f"{who} {describe_exit(status)}")


if __name__ == "__main__":
    main()
