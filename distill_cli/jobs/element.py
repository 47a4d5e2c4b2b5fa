"""`python -m distill_cli.jobs.element RUN`: a run that was prepared, carried out in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.run import carry_out, exit_status, job_of
from distill_cli.terminal.console import Console


def main() -> int:
    """The exit status is that of `distill train`."""
    run = RunDir(Path(sys.argv[1]))
    try:
        with exit_status() as status, run.lock():
            carry_out(job_of(run), run.unused_attempt(), console=Console(highlight=False, soft_wrap=True))
        return status.value
    except DistillError as error:
        print(f"error: {error}", flush=True)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
