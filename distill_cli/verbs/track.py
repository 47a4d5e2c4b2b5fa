"""Send trackers what they have not received yet (`track sync`).

A tracking server that is away delays no run. What it missed (metrics, parameters, tags, files) is sent when the server
is back, or by this command afterwards; what it has already is not sent again. Keys of trackers send a run to another
one than its own.

examples
  distill track sync runs/latest
  distill track sync runs/latest --uri http://localhost:5000
  distill track sync runs/latest tracker=wandb tracker.wandb.project=mine
"""

from pathlib import Path

from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Arguments, Parser, is_override


def declare(parser: Parser) -> None:
    parser.add_argument("action", choices=("sync",), metavar="sync")
    parser.add_argument("paths", nargs="+", metavar="RUN|SWEEP|OVERRIDE", help="folders, and keys of trackers")
    parser.add_argument("--uri", help="another server than the one that the run was sent to")


def main(arguments: Arguments) -> int:
    """Send what is missing; return 0.

    Raises:
        ConfigError: no such run or sweep, or an override is wrong.
        DistillError: a tracker does not accept it.
    """
    from distill_cli.track.run_tracking import track

    overrides = [word for word in arguments.paths if is_override(word)]
    paths = [Path(word) for word in arguments.paths if not is_override(word)]
    if not paths:
        raise ConfigError("distill track sync: give the folder of a run or a sweep, such as runs/latest")
    return track(paths, uri=arguments.uri, overrides=overrides)
