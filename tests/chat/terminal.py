"""A pseudo-terminal in which a command runs, and what a user types and sees there."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 240.0


class Terminal:
    """A command at a terminal of `width` columns."""

    def __init__(self, command: Sequence[str], *, folder: Path, width: int) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self.modes_before = termios.tcgetattr(theirs)
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._theirs = theirs
        self.seen = ""
        self._read = 0
        """Characters of `seen` that were waited for already."""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, *, patience_s: float = PATIENCE_S) -> str:
        """Return what appears up to a text, and the text."""
        until = time.monotonic() + patience_s
        while (at := self.seen.find(text, self._read)) < 0:
            assert time.monotonic() < until, f"no {text!r} in {self.seen[self._read :]!r}"
            if select.select([self._ours], [], [], 1.0)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")
            else:
                assert self.process.poll() is None, f"it ended: {self.seen!r}"
        shown, self._read = self.seen[self._read : at + len(text)], at + len(text)
        return shown

    def interrupt_for(self, text: str) -> None:
        """Press Ctrl-C at a prompt until a text appears.

        readline shows its prompt before it listens: a signal in between is seen with the next key only.
        """
        until = time.monotonic() + PATIENCE_S
        while text not in self.seen[self._read :]:
            assert time.monotonic() < until, f"no {text!r} in {self.seen[self._read :]!r}"
            self.type("\x03")
            if select.select([self._ours], [], [], 1.0)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")
        self.wait_for(text)

    def end(self) -> int:
        """Return the exit status, once the command has ended."""
        until = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < until, self.seen
            if select.select([self._ours], [], [], 0.2)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")
        while select.select([self._ours], [], [], 0.2)[0]:
            self.seen += os.read(self._ours, 65536).decode(errors="replace")
        return self.process.returncode

    def modes(self) -> list:
        """Return the terminal's modes, as `termios.tcgetattr` has them."""
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)
