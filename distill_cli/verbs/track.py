"""Send trackers what they could not be sent before (`track sync`).

A tracking server that was away delays no run. What it missed (metrics, parameters, tags, artifacts) follows by itself
when it is back, or by this command afterwards; what is there already is not sent again.

examples
  distill track sync runs/latest
  distill track sync runs/latest --uri http://localhost:5000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill_cli.track.run_tracking import track
from distill_cli.verbs.command_line import Parser


def declare(parser: Parser) -> None:
    parser.add_argument("action", choices=("sync",), metavar="sync")
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|SWEEP", help="folders, such as runs/latest")
    parser.add_argument("--uri", help="another server than the one that the run was sent to")


def main(arguments: argparse.Namespace) -> int:
    """Send what is missing; return 0.

    Raises:
        ConfigError: no such run or sweep.
        DistillError: a tracker does not take it.
    """
    return track(arguments.paths, uri=arguments.uri)
