"""The program of `CompanionTeacher`: `python -m distill_cli.engines.companion_process SOCKET PARENT`."""

import os
import signal
import sys
from multiprocessing.connection import Connection

from distill_cli.engines.process_setup import import_transformers, prepare_process
from distill_cli.machine.processes import die_with_parent
from distill_cli.terminal.step_printer import log_to


def main() -> None:
    """Serve the rank with process id PARENT over the inherited socket SOCKET until it is gone."""
    die_with_parent(parent=int(sys.argv[2]))
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the rank handles them: it may finish a step and save first
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else a child would hold the socket open after this process died
    log_to(sys.stderr)
    prepare_process()  # before torch
    import_transformers()
    from distill_cli.engines.companion import serve

    serve(Connection(descriptor))


if __name__ == "__main__":
    main()
