"""Everything that a report shows of one run, read from its folder. What is missing is left out of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.report.read import RunResult, read_config

MAX_ROWS = 1000
"""Of a run's steps in a page; where there are more, neighbours are averaged."""
MAX_ROWS_IN_ALL = 4000
"""Of all runs of a page."""


@dataclass(frozen=True)
class History:
    """One run, from its first step to its last so far."""

    result: RunResult
    name: str
    """What tells it from the page's other runs."""
    rows: Sequence[dict[str, float | None]]
    """As metrics.jsonl has them."""
    config: dict[str, Any]
    """Dotted keys."""
    outcome: dict[str, Any]
    """Empty where the run has not ended."""
    memory: dict[str, Any]
    """The predicted peak of a rank, by part, from resolved.json; empty if there is no prediction."""
    command: str

    @property
    def folder(self) -> Path:
        return self.result.folder

    @property
    def steps(self) -> list[dict[str, float | None]]:
        """Without step 0, which comes before training."""
        return [row for row in self.rows if row["step"] > 0]

    @cached_property
    def sample_files(self) -> list[tuple[int, Path]]:
        """The recorded steps and their files, the earliest first."""
        found = [
            (file.stem.removeprefix("step_"), file) for file in RunDir(self.folder).rollouts.glob("step_*.parquet")
        ]
        return sorted((int(step), file) for step, file in found if step.isdigit())

    def first(self, key: str) -> float | None:
        """The value at step 0."""
        return next((row.get(key) for row in self.rows if row["step"] == 0), None)

    def last(self, key: str) -> float | None:
        """The newest value after step 0."""
        return next((row[key] for row in reversed(self.steps) if row.get(key) is not None), None)


def read_history(result: RunResult, *, name: str) -> History:
    run = RunDir(result.folder)
    return History(
        result=result,
        name=name,
        rows=read_metrics(run.metrics) if run.metrics.is_file() else [],
        config=read_config(run) if run.config.is_file() else {},
        outcome=_json(run.outcome),
        memory=_json(run.resolved).get("memory") or {},
        command=run.command.read_text().strip() if run.command.is_file() else "",
    )


def read_histories(results: Sequence[RunResult]) -> list[History]:
    """In their order, each under a name of its own."""
    names = [_told(result) for result in results]
    if len(set(names)) < len(names):
        names = [result.name for result in results]
    if len(set(names)) < len(names):
        names = [str(result.folder) for result in results]
    return [read_history(result, name=name) for result, name in zip(results, names, strict=True)]


def thinned(rows: Sequence[dict[str, float | None]], most: int) -> list[dict[str, float | None]]:
    """At most about `most` rows: means over neighbours, under the last one's step."""
    width = -(-len(rows) // most) if rows else 1
    if width == 1:
        return list(rows)
    return [_mean(rows[begin : begin + width]) for begin in range(0, len(rows), width)]


def _mean(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items() if found} | {"step": rows[-1]["step"]}


def _told(result: RunResult) -> str:
    if not result.settings:
        return result.name
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in result.settings.items())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
