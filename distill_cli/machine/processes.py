"""End a process with the one that started it, describe how one ended, and note signals to stop."""

import ctypes
import os
import signal
import sys
import time

import psutil

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *arguments: 0
"""Looked up here: in a process that was forked while another thread loaded a library, a look-up would not end."""
LAUNCHER_PID = "DISTILL_LAUNCHER"
"""Environment variable of a rank: the process id of the launcher that started its torchrun."""


def die_with_parent(*, parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent dies, however that happens. Linux only.

    Args:
        parent: the parent's process id, by which a death before this call is noticed. A rank, whose parent is torchrun,
            uses `LAUNCHER_PID` instead.
    """
    if sys.platform != "linux":
        return
    PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show of this process. Linux only."""
    PRCTL(PR_SET_NAME, name.encode())


def die_with_torchrun() -> None:
    """Call `die_with_parent` in a rank, whose parent must still be the torchrun that the launcher started."""
    die_with_parent()
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and psutil.Process(os.getppid()).ppid() != int(launcher):
        os._exit(1)


def describe_exit(status: int) -> str:
    """Return how a process ended, from its exit status as in `subprocess`: negative for a signal."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class StopFlag:
    """A flag that signals set, or a deadline; the training loop checks it where stopping is safe."""

    def __init__(self, *, deadline: float | None = None) -> None:
        """`deadline` is in seconds since 1970; None is no limit."""
        self.reason = ""
        self.is_failure = False
        """Whether what set the flag is a failure."""
        self._is_set = False
        self._deadline = deadline

    def listen(self, *signums: int) -> None:
        """Let these signals set the flag."""
        for signum in signums:
            signal.signal(signum, self._on_signal)

    def fail(self, reason: str) -> None:
        """Set the flag because something failed that the run may survive."""
        self._is_set, self.reason, self.is_failure = True, reason, True

    def is_set(self, *, within_s: float = 0.0) -> bool:
        """Return whether a signal came, or the deadline is at most `within_s` seconds away."""
        if self._deadline is not None and not self._is_set and time.time() + within_s > self._deadline:
            self._is_set, self.reason = True, "checkpoint.must_save_by"
        return self._is_set

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._is_set, self.reason = True, signal.Signals(signum).name
