"""Everything that a report shows of one run, read from its folder. What is missing is left out of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_cli.folders.attempts import Outcome, read_outcome
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, read_json
from distill_cli.metrics import gap_closed
from distill_cli.report.read import RunResult, read_config

MAX_ROWS = 1000
"""Steps of one run in a page; neighbouring steps are averaged if there are more."""
MAX_ROWS_IN_ALL = 4000
"""Steps of all runs in a page."""
Row = dict[str, Any]
"""A row of metrics.jsonl: numbers, or None."""


@dataclass(frozen=True)
class History:
    """One run, from its first step to its last so far."""

    result: RunResult
    name: str
    """Unique in the page."""
    rows: Sequence[Row]
    config: dict[str, Any]
    """Dotted keys."""
    outcome: Outcome | None
    """None if the run has not ended."""
    memory: dict[str, Any]
    """`resolved.PredictedMemory` as resolved.json has it; empty if there is no prediction."""
    command: str

    @property
    def steps(self) -> list[Row]:
        """The rows without step 0, which comes before training."""
        return [row for row in self.rows if row["step"] > 0]

    @cached_property
    def sample_files(self) -> list[tuple[int, Path]]:
        """The recorded steps and their files, the earliest first."""
        files = [(file.stem[5:], file) for file in RunDir(self.result.folder).rollouts.glob("step_*.parquet")]
        return sorted((int(step), file) for step, file in files if step.isdigit())

    @property
    def accuracies(self) -> tuple[float | None, float | None, float | None]:
        """Held-out accuracy before training, at the last validation after it began, and of the teacher."""
        return self.first("val/accuracy"), self.last("val/accuracy"), self.first("val/teacher_accuracy")

    @property
    def gap_closed(self) -> float | None:
        """See `metrics.gap_closed`."""
        return gap_closed(*self.accuracies)

    def first(self, key: str) -> float | None:
        """Return the value at step 0."""
        return next((row.get(key) for row in self.rows if row["step"] == 0), None)

    def last(self, key: str) -> float | None:
        """Return the newest value after step 0."""
        return next((row[key] for row in reversed(self.steps) if row.get(key) is not None), None)


def read_histories(results: Sequence[RunResult]) -> list[History]:
    """Read runs in their order. Each is named by its settings, folder name or path: the first that is unique."""
    names: list[str] = []
    for name_of in (_settings, lambda result: result.name, lambda result: str(result.folder)):
        names = [name_of(result) for result in results]
        if len(set(names)) == len(names):
            break
    return [_read_history(result, name) for result, name in zip(results, names, strict=True)]


def _read_history(result: RunResult, name: str) -> History:
    run = RunDir(result.folder)
    return History(
        result=result,
        name=name,
        rows=read_metrics(run.metrics) if run.metrics.is_file() else [],
        config=read_config(run) if run.config.is_file() else {},
        outcome=read_outcome(run),
        memory=(read_json(run.resolved).get("memory") if run.resolved.is_file() else None) or {},
        command=run.command.read_text().strip() if run.command.is_file() else "",
    )


def _settings(result: RunResult) -> str:
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in result.settings.items()) or result.name


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """Return at most about `most` rows: means over neighbours, each with the last neighbour's step."""
    return [_mean(group) for group in groups(rows, most)] if len(rows) > most else list(rows)


def groups(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """Return at most `most` groups of neighbouring rows, all but the last of one size."""
    width = -(-len(rows) // most) or 1
    return [rows[begin : begin + width] for begin in range(0, len(rows), width)]


def _mean(rows: Sequence[Row]) -> Row:
    values: dict[str, list[float]] = {}
    for key, value in (item for row in rows for item in row.items() if item[1] is not None):
        values.setdefault(key, []).append(value)
    return {key: sum(numbers) / len(numbers) for key, numbers in values.items()} | {"step": rows[-1]["step"]}
