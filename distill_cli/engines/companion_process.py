"""A companion's process: `python -m distill_cli.engines.companion_process SOCKET`, started by `CompanionScorer`."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from distill_cli.engines.process import hide_broken_packages, prepare_process
from distill_cli.log import log_to
from distill_cli.processes import die_with_parent


def main() -> None:
    die_with_parent()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else a child of ours would hold the socket open after our death
    log_to(sys.stderr)
    prepare_process()  # before torch
    hide_broken_packages()
    from distill_cli.engines.companion import serve

    serve(Connection(descriptor))


if __name__ == "__main__":
    main()
