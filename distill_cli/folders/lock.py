"""A folder belongs to one process at a time, also where it is shared by several machines.

flock keeps out the processes of this machine, and those of others where the file system carries it over. Not every one
does, so whoever has the lock also touches its file every `SIGN_S` seconds: a file that another machine's process left
behind is watched for such signs of life before it is taken over. Nobody's clock matters.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

SIGN_S = 5.0
WATCH_S = 20.0
"""How long no sign of life is none; file systems over a network show a change some seconds late."""


class InUse(Exception):
    """The message says by which process, on which host."""


@contextmanager
def hold(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the lock for this process; it is free again when the process ends, however that happens.

    Args:
        path: the lock's file; says who has it.
        wait_s: how long another process may take to let go of it.

    Raises:
        InUse: another process has it.
    """
    deadline = time.monotonic() + wait_s
    with path.open("a+") as file:
        while (locked := try_lock(file)) is False:
            if time.monotonic() > deadline:
                raise InUse(holder(path) or "another process")
            time.sleep(0.5)
        before, host = holder(path), platform.node()
        if before and (locked is None or not before.endswith(f" on {host}")):
            log.warning("%s was last used by %s: watching for %g s whether it lives", path.parent, before, WATCH_S)
            while shows_life(path):
                if time.monotonic() > deadline:
                    raise InUse(before)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {host}")
        file.flush()
        ended = threading.Event()
        threading.Thread(target=give_signs, args=(path, ended), name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            file.truncate(0)


def holder(path: Path) -> str:
    """Who has it or left it behind; empty where it was given back."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def try_lock(file: IO[str]) -> bool | None:
    """None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s: this file system has no locks (%s); signs of life stand for them", file.name, error.strerror)
        return None
    return True


def give_signs(path: Path, ended: threading.Event) -> None:
    while not ended.wait(SIGN_S):
        with suppress(OSError):
            os.utime(path)


def shows_life(path: Path) -> bool:
    """Whether its holder touches it; one that gives it back does not."""
    first, end = modified(path), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(0.2)
        if modified(path) != first:
            return bool(holder(path))
    return False


def modified(path: Path) -> int:
    with path.open() as file:  # opening asks a file server, where stat alone may not
        return os.fstat(file.fileno()).st_mtime_ns
