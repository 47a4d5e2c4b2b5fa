"""Follow a run in progress, wherever it runs.

Reads the run's own files, so a job on another machine can be followed if its folder is visible here. Ends when the run
ends; Ctrl-C leaves the run alone.

examples
  distill watch runs/latest
"""

import sys
from pathlib import Path

from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="its folder, such as runs/latest")


def main(arguments: Arguments) -> int:
    """Follow a run until it ends; return the exit status, 1 if the run failed.

    Raises:
        ConfigError: there is no such run.
    """
    from distill_cli.folders.run_dir import open_run
    from distill_cli.jobs.submit import follow
    from distill_cli.report.read import state_of

    run = open_run(Path(arguments.run))
    try:
        return follow(run)
    except KeyboardInterrupt:
        print(f"\nthe run is {state_of(run)}; distill watch {arguments.run} follows it again", file=sys.stderr)
        return 130
