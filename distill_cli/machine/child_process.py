"""Start a Python module as a child process with a socket between both, and the child's side of it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import IO

from distill_cli.machine.processes import die_with_parent


def start_child(
    module: str, env: Mapping[str, str], *, output: IO[bytes] | int | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start `python -m MODULE SOCKET PARENT`; return the process and this end of the socket to it.

    The child ends with the thread that calls this.

    Args:
        env: the child's environment.
        output: where its output goes, a file or such as subprocess.DEVNULL; None is where this process's goes.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
            env=env,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return process, Connection(ours.detach())


def connect_to_parent() -> Connection:
    """Return this end of the socket to the process that called `start_child`; end with it, and leave signals to it."""
    die_with_parent(parent=int(sys.argv[2]))
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the parent handles them: it may finish a step and save first
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else a child would hold the socket open after this process died
    return Connection(descriptor)
