"""Lock a folder for one process, also on a file system that several machines share.

flock excludes the processes of this machine, and of others if the file system propagates it. Not every one does, so the
holder also touches the lock's file every `SIGN_S` seconds: before a file that names another machine's process is taken
over, it is watched for such signs of life. Clocks need not agree.
"""

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

from distill_cli.errors import ConfigError

log = logging.getLogger(__name__)

SIGN_S = 5.0
WATCH_S = 20.0
"""How long a dead holder is watched; network file systems show a change some seconds late."""


@contextmanager
def hold(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder; it is free again when the process ends, however that happens.

    Args:
        path: the lock's file, in the folder; it names the holder.
        wait_s: how long to wait for another process to release it.

    Raises:
        ConfigError: another process, which the message names, holds the lock.
    """
    deadline = time.monotonic() + wait_s

    def check_deadline(who: str) -> None:
        if time.monotonic() > deadline:
            raise ConfigError(f"{path.parent}: in use by {who}; wait for it to end, or stop it")

    with path.open("a+") as file:
        while (locked := try_lock(file)) is False:
            check_deadline(holder(path) or "another process")
            time.sleep(0.5)
        before, host = holder(path), platform.node()
        if before and (locked is None or not before.endswith(f" on {host}")):
            log.warning("%s was last used by %s: watching for %g s whether it is alive", path.parent, before, WATCH_S)
            while shows_life(path):
                check_deadline(before)
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
    """Return the process that holds the lock, or that died with it; empty if the lock was released."""
    return path.read_text().strip() if path.exists() else ""


def try_lock(file: IO[str]) -> bool | None:
    """Try to lock the file; return whether it is locked now, None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s: this file system has no locks (%s); using signs of life instead", file.name, error.strerror)
        return None
    return True


def give_signs(path: Path, ended: threading.Event) -> None:
    """Touch the lock's file until the event is set."""
    while not ended.wait(SIGN_S):
        with suppress(OSError):
            os.utime(path)


def shows_life(path: Path) -> bool:
    """Return whether a holder touches the file within `WATCH_S`, other than by releasing the lock."""
    first, end = modified(path), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(0.2)
        if modified(path) != first:
            return bool(holder(path))
    return False


def modified(path: Path) -> int:
    """Return the file's modification time in ns."""
    with path.open() as file:  # opening asks the file server; stat alone may be cached
        return os.fstat(file.fileno()).st_mtime_ns
