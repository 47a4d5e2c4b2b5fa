"""metrics.jsonl, on a disk that fills and after a kill in the middle of a line."""

import json
import logging
from contextlib import closing
from pathlib import Path

import pytest

from distill_cli.folders.metrics_file import MetricsFile, read_metrics


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as other:
        while True:
            other.write(bytes(4096))


def test_rows_wait_on_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, filler = small_disk / "metrics.jsonl", small_disk / "filler"
    with closing(MetricsFile(path)) as file:
        file.write(0, {"train/loss": 1.0})
        with pytest.raises(OSError, match="No space"):
            fill(filler)
        with caplog.at_level(logging.WARNING):
            for step in range(1, 101):  # beyond the file's first block
                file.write(step, {"train/loss": 1.0 / 3 + step})
        assert steps(path) == list(range(len(steps(path))))  # whole lines alone are read
        assert len(steps(path)) < 101
        (record,) = caplog.records
        assert "No space left on device; its rows wait in memory" in record.getMessage()
        filler.unlink()
        file.write(101, {})
        assert steps(path) == list(range(102))


def test_cut_off_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsFile(path)) as file:
        file.write(0, {"a": 0.5})
    path.write_text(path.read_text() + '{"step": 1, "ti')
    with closing(MetricsFile(path)) as file:
        file.write(1, {"a": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
