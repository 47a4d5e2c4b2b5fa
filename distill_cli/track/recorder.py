"""One object a step into metrics.jsonl, flushed as written; MLflow follows from there.

Only the main rank records. The file is the truth: whatever else shows metrics reads them from it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class MetricsFile:
    """Appends to metrics.jsonl. `step` and `time` (seconds since 1970) come first in each line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "time": round(time.time(), 3), **{key: _plain(value) for key, value in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def _plain(value: float) -> float | int | None:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.9g}") if math.isfinite(value) else None
