"""Show the runs below a folder in a browser: a list, each run live, and comparisons.

Serves a page on 127.0.0.1 that reads the runs' files and changes nothing. A run's page is its report, kept up to date
while the run lasts. For runs on another machine, forward the port: ssh -L 8009:127.0.0.1:8009 HOST.

examples
  distill ui
  distill ui /data/runs --port 9000 --no-browser
"""

import sys
from pathlib import Path

from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Arguments, Parser, number


def declare(parser: Parser) -> None:
    parser.add_argument("runs", nargs="?", type=Path, metavar="RUNS", help="folder that holds the runs (runs)")
    parser.add_argument("--port", default="8009", metavar="N", help="port (8009); 0 is any that is free")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open no browser")


def main(arguments: Arguments) -> int:
    """Serve the page until Ctrl-C; return 0.

    Raises:
        ConfigError: the folder is none, or the port is not free.
    """
    from distill_cli.ui.server import serve

    root = arguments.runs or Path("runs")  # which may be made later, by the first run
    if not root.is_dir() and (arguments.runs or root.exists()):
        what = "is no folder" if root.exists() else "no such folder"
        raise ConfigError(f"{root}: {what}; give the folder that holds the runs (by default runs)")
    port = number("--port", arguments.port, at_least=0, at_most=65535)
    serve(root, port=port, opens_browser=sys.stdout.isatty() and not arguments.no_browser)
    return 0
