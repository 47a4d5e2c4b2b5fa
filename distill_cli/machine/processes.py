"""Processes: ending with the one that started them, how they ended, and being asked to end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import psutil

PR_SET_PDEATHSIG = 1


LAUNCHER_PID = "DISTILL_LAUNCHER"
"""In a rank's environment: the process id of what started its torchrun."""


def die_with_parent(*, parent: int | None = None) -> None:
    """In a child: the kernel kills it when its parent dies, however that happens. Linux only.

    Args:
        parent: its process id, which tells that it died before this call; a rank, whose parent is torchrun, is told
            by `LAUNCHER_PID` instead.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_torchrun() -> None:
    """In a rank: `die_with_parent`, whose parent must still be the torchrun that the launcher started."""
    die_with_parent()
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and psutil.Process(os.getppid()).ppid() != int(launcher):
        os._exit(1)


def describe_exit(status: int) -> str:
    """What became of a process, from its exit status as `subprocess` has it: negative for a signal."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class StopFlag:
    """Set by signals, or when the time is up. Set is all it is: whoever works looks at it where stopping is safe."""

    def __init__(self, *, deadline: float | None = None) -> None:
        """`deadline`: in seconds since 1970; None is no limit."""
        self.reason = "another rank was asked to stop"
        self._is_set = False
        self._deadline = deadline

    def listen(self, *signums: int) -> None:
        """Lets these signals set the flag."""
        for signum in signums:
            signal.signal(signum, self._on_signal)

    def is_set(self, *, within_s: float = 0.0) -> bool:
        """Whether the time is up, or will be in `within_s` seconds, or a signal came."""
        if self._deadline is not None and not self._is_set and time.time() + within_s > self._deadline:
            self._is_set, self.reason = True, "checkpoint.must_save_by"
        return self._is_set

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._is_set, self.reason = True, signal.Signals(signum).name
