"""Rich's console, and handling of a closed output pipe."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING

import rich.console
from rich.markup import escape

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READER_GONE = 128 + signal.SIGPIPE
"""The exit status of a command whose reader left, the one that shells report."""


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Raise; `cli.main` then exits with READER_GONE. Rich would exit with status 1."""
        raise BrokenPipeError

    def warn(self, text: str) -> None:
        self.print(f"warning: {escape(text)}")


class RankOutput(io.FileIO):
    """The main rank's stream to the user. On a broken pipe, raise SIGHUP so that the run saves and stops, as for a
    closed terminal: a failed write would count as a failure of the run."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            discard(self.fileno())
            if callable(signal.getsignal(signal.SIGHUP)):
                signal.raise_signal(signal.SIGHUP)
            return memoryview(data).nbytes


def discard(descriptor: int | None = None) -> None:
    """Send all further output of a descriptor (standard output by default) to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno() if descriptor is None else descriptor)
    os.close(null)
