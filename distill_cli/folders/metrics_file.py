"""One object a step into metrics.jsonl, flushed as written; trackers follow from there.

Only the main rank records. The file is the truth: whatever else shows metrics reads them from it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from distill_cli.errors import DistillError
from distill_cli.folders.atomic_dir import replacing

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends to metrics.jsonl. `step` and `time` (seconds since 1970) come first in each line.

    Rows that find the disk full wait in memory for the next one, with a warning: what the file says stays whole.
    """

    def __init__(self, path: Path) -> None:
        drop_cut_line(path)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "time": round(time.time(), 3), **{key: plain(value) for key, value in metrics.items()}}
        was_full = bool(self._waiting)
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not was_full:
                log.warning("%s: %s; its rows wait in memory, and the run goes on", self._path, error.strerror)

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: not all of it could be written.
        """
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        self.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def drop_cut_line(path: Path) -> None:
    """Takes away a last line that was cut off by a kill or a full disk."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read_metrics(path: Path, *, after_step: int = -1) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl beyond a step; a last line that was cut off is left out.

    Raises:
        DistillError: the file is damaged.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") and _step(line) > after_step]
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: ValueError) -> DistillError:
    return DistillError(f"{path}: holds a line that is no row of metrics ({error}); take that line out")


def _step(line: str) -> int:
    """What a line begins with, without reading all of it."""
    return int(line[len('{"step": ') : line.index(",")])


def cut_back(path: Path, *, last_step: int, removed_to: Path) -> int:
    """Leaves the rows up to `last_step`; what comes after goes to `removed_to`. The number of rows taken out.

    Done again after being killed in the middle, it ends the same.
    """
    if not path.exists():
        return 0
    kept, removed = [], []
    for line in path.read_text().splitlines(keepends=True):
        is_kept = line.endswith("\n") and _step(line) <= last_step
        (kept if is_kept else removed).append(line)
    if removed:
        removed_to.write_text("".join(removed))
        with replacing(path) as temporary:
            temporary.write_text("".join(kept))
    return len(removed)


def plain(value: float | None) -> float | int | None:
    """A number as JSON has it. JSON knows no NaN and no infinity: null stands for them."""
    if value is None or isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.9g}") if math.isfinite(value) else None
