"""Processes: ending with the one that started them, how they ended, and being asked to end."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a child: the kernel kills it when its parent dies, however that happens. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def describe_exit(status: int) -> str:
    """What became of a process, from its exit status as `subprocess` has it: negative for a signal."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class StopFlag:
    """Set by signals, or when the time is up. Set is all it is: whoever works looks at it where stopping is safe."""

    def __init__(self, *, limit_s: float | None = None) -> None:
        """`limit_s`: from now on, in seconds; None is no limit."""
        self.reason = "another rank was asked to stop"
        self._is_set = False
        self._deadline = time.monotonic() + limit_s if limit_s is not None else None

    def listen(self, *signums: int) -> None:
        """Lets these signals set the flag."""
        for signum in signums:
            signal.signal(signum, self._on_signal)

    def is_set(self) -> bool:
        if self._deadline is not None and not self._is_set and time.monotonic() > self._deadline:
            self._is_set, self.reason = True, "checkpoint.must_save_by"
        return self._is_set

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._is_set, self.reason = True, signal.Signals(signum).name
