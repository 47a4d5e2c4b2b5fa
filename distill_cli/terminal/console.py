"""Rich's console for what the user reads, and what becomes of output that nobody reads any more."""

from __future__ import annotations

import io
import os
import signal
import sys

import rich.console
from rich.markup import escape

READER_GONE = 128 + signal.SIGPIPE
"""The exit status of a command whose reader left, as a shell has it of any other."""


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process with status 1; `cli.main` does it with READER_GONE."""
        raise BrokenPipeError

    def warn(self, text: str) -> None:
        self.print(f"warning: {escape(text)}")


class RankOutput(io.FileIO):
    """The main rank's way to the user. Once nobody reads it, the rank is told as by a terminal that was closed.

    A write that fails would be taken for a failure of the run, which is to be saved first.
    """

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            discard(self.fileno())
            if callable(signal.getsignal(signal.SIGHUP)):  # whoever heeds it
                signal.raise_signal(signal.SIGHUP)
            return len(data)


def discard(descriptor: int | None = None) -> None:
    """Lets what is still written there (to standard output) go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno() if descriptor is None else descriptor)
    os.close(nowhere)
