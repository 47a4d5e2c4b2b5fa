"""Append one JSON object per step to metrics.jsonl, flushed as written.

Only the main rank writes. The file is the truth: everything else that shows metrics, trackers included, reads it.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

from distill_cli.errors import DistillError
from distill_cli.folders.atomic_dir import replacing

log = logging.getLogger(__name__)


class MetricsFile:
    """Append to metrics.jsonl. `step` and `time` (seconds since 1970) come first in each line.

    On a full disk rows wait in memory for the next write, with a warning; all rows in the file stay complete.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):  # cut off by a kill or a full disk
            os.truncate(path, content.rfind(b"\n") + 1)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row; values that are not finite become null."""
        row = {"step": step, "time": round(time.time(), 3), **{key: plain(value) for key, value in metrics.items()}}
        was_full = bool(self._waiting)
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not was_full:
                log.warning("%s: %s; its rows wait in memory, and the run goes on", self._path, error.strerror)

    def flush(self) -> None:
        """Write the rows that wait. Raises OSError if not all could be written."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Close the file with all rows on permanent storage. Raises OSError if that fails."""
        self.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path, *, after_step: int = -1) -> list[dict[str, float]]:
    """Return the rows of a metrics.jsonl after a step, without a last line that was cut off.

    Raises:
        DistillError: the file is damaged.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") and _step(line) > after_step]
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: ValueError) -> DistillError:
    """Return the error about a line that is no JSON."""
    return DistillError(f"{path}: holds a line that is no row of metrics ({error}); remove that line")


def _step(line: str) -> int:
    """Return the step of a line without parsing all of it."""
    return int(line[len('{"step": ') : line.index(",")])


def cut_back(path: Path, *, last_step: int, removed_to: Path) -> int:
    """Keep the rows up to `last_step`, move the later ones to `removed_to`; return the number of moved rows.

    If killed in the middle and called again, the result is the same.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = list(takewhile(lambda line: line.endswith("\n") and _step(line) <= last_step, lines))
    if removed := lines[len(kept) :]:
        removed_to.write_text("".join(removed))
        with replacing(path) as temporary:
            temporary.write_text("".join(kept))
    return len(removed)


def plain(value: float | None) -> float | int | None:
    """Return a number as the file holds it: nine digits; None for NaN and infinity, which JSON lacks."""
    if value is None or isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.9g}") if math.isfinite(value) else None
