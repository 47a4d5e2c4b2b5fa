"""Send trackers what they have not received yet (`track sync`).

A tracking server that is away delays no run. What it missed (metrics, parameters, tags, artifacts) is sent when the
server is back, or by this command afterwards; what it has already is not sent again.

examples
  distill track sync runs/latest
  distill track sync runs/latest --uri http://localhost:5000
"""

from pathlib import Path

from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_argument("action", choices=("sync",), metavar="sync")
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|SWEEP", help="folders, such as runs/latest")
    parser.add_argument("--uri", help="another server than the one that the run was sent to")


def main(arguments: Arguments) -> int:
    """Send what is missing; return 0.

    Raises:
        ConfigError: no such run or sweep.
        DistillError: a tracker does not accept it.
    """
    from distill_cli.track.run_tracking import track

    return track(arguments.paths, uri=arguments.uri)
