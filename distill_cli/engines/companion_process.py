"""The program of a companion, a teacher in a process of its own, and how it is started and ends. No torch at first.

python -m distill_cli.engines.companion_process SOCKET PARENT
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import IO

from distill_cli.engines.process_setup import import_transformers, prepare_process
from distill_cli.errors import DistillError, Killed
from distill_cli.machine.child_process import connect_to_parent, start_child
from distill_cli.machine.processes import describe_exit
from distill_cli.terminal.step_printer import log_to

EXIT_S = 10.0
"""How long a companion that closed its socket may take to exit."""
STORE_FILE = "DISTILL_COMPANION_STORE"
"""Environment variable of a scoring server's companions: the file at which those of one engine meet."""


def main() -> None:
    """Serve the process with id PARENT over the inherited socket SOCKET until it is gone."""
    connection = connect_to_parent()
    log_to(sys.stderr)
    prepare_process()  # before torch
    import_transformers()
    from distill_cli.engines.companion import serve

    serve(connection)


def start_process(
    variables: Mapping[str, str], *, output: IO[bytes] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a companion with these environment variables added; return it and this end of the socket to it.

    It ends with the thread that calls this.

    Args:
        output: a file for what it prints; None is where this process prints.
    """
    environ = {**os.environ, **variables}
    return start_child("distill_cli.engines.companion_process", environ, output=output)


def death_of(process: subprocess.Popen[bytes], who: str) -> DistillError:
    """Return how a companion ended that has closed its socket; `who` begins the message."""
    try:
        status = process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        return Killed(f"{who} does not answer")
    return (Killed if status < 0 else DistillError)(f"{who} {describe_exit(status)}")


if __name__ == "__main__":
    main()
