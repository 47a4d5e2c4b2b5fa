"""Read runs from their folders: results for tables and searches, and the history that the page shows.

For the last values only the end of a metrics.jsonl is parsed, so that a sweep of a thousand runs is compared in
seconds. What is missing in a folder is left out of the page.
"""

import json
import math
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from distill_cli.config.fields import flatten
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.attempts import Outcome, read_outcome
from distill_cli.folders.metrics_file import damaged, read_metrics
from distill_cli.folders.run_dir import RunDir, SweepDir, read_json
from distill_cli.metrics import METRICS, gap_closed

COMPARED = [metric for metric in METRICS if metric.compared_in]
"""The metrics that runs are compared by."""
TAIL_BYTES = 1 << 16
"""Bytes that are read at a time from the end of a metrics.jsonl."""
Row = dict[str, Any]
"""A row of metrics.jsonl: numbers, or None."""
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What files with unexpected content raise when they are read."""
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader takes an eighth of the time of the one in Python."""


@dataclass(frozen=True)
class RunResult:
    """One run, as far as it has come."""

    folder: Path
    settings: dict[str, str]
    """The keys that differ between the compared runs, as typed, and their values."""
    state: str
    """`waiting`, `running`, `finished`, `stopped` or `failed`."""
    step: int
    """The last recorded step; 0 if there is none."""
    final: dict[str, float]
    """The last value after step 0 of each metric of `COMPARED`, or its sum over the steps (`is_total`)."""
    sweep: Path | None = None
    """The folder of the sweep that was read; None for a run that was named by itself."""

    @property
    def name(self) -> str:
        return self.folder.name


def read_results(paths: Sequence[Path]) -> list[RunResult]:
    """Read every run in these folders, each the folder of a run or of a sweep.

    Raises:
        ConfigError: a folder is neither.
    """
    results: list[RunResult] = []
    single: list[Path] = []
    for path in paths:
        sweep = SweepDir(path.resolve())
        if sweep.file.is_file():
            results += read_sweep(sweep)
        elif RunDir(path).config.is_file():
            single.append(path.resolve())
        else:
            what = "neither a run (config.yaml) nor a sweep (sweep.json)" if path.exists() else "no such folder"
            raise ConfigError(f"{path}: {what}; give the folder of a run or a sweep, such as runs/latest")
    configs = [read_config(RunDir(path)) for path in single]
    keys = differing_keys(configs)
    settings = [{key: str(config.get(key)) for key in keys} for config in configs]
    return results + [_read_run(*run) for run in zip(single, settings, strict=True)]


def read_sweep(sweep: SweepDir) -> list[RunResult]:
    """Return the runs of a sweep in its order; those that have not begun are `waiting`."""
    runs = [(sweep.path / one.folder, [text.lstrip("+") for text in one.overrides]) for one in sweep.elements()]
    return [_read_run(folder, dict(text.split("=", 1) for text in overrides), sweep.path) for folder, overrides in runs]


@contextmanager
def naming_damage(what: str | Path) -> Iterator[None]:
    """Raise DistillError, which names what is read here, if a file of it has unexpected content."""
    try:
        yield
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DistillError(f"{what}: one of its files is damaged ({reason}); leave that run out") from error


def _read_run(folder: Path, settings: dict[str, str], sweep: Path | None = None) -> RunResult:
    run = RunDir(folder)
    with naming_damage(folder):
        final = last_values(run.metrics, ["step", *(metric.name for metric in COMPARED if not metric.is_total)])
        step = int(final.pop("step", 0))
        final |= totals(run.metrics, [metric.name for metric in COMPARED if metric.is_total])
        return RunResult(folder, settings, state_of(run), step, final, sweep)


def state_of(run: RunDir) -> str:
    """Return the state of a run by the files in its folder: see `RunResult.state`."""
    if outcome := read_outcome(run):
        return outcome.state
    if not run.config.is_file() or run.is_new():
        return "waiting"
    if _is_held(run):
        return "running"
    return "waiting" if run.open_job() else "failed"


def _is_held(run: RunDir) -> bool:
    """Return whether a live process holds the folder. A process on another host counts as alive."""
    holder = run.holder()
    process = re.fullmatch(r"process (\d+) on (.*)", holder)
    return bool(holder) and (process is None or process[2] != platform.node() or psutil.pid_exists(int(process[1])))


def last_values(path: Path, names: Iterable[str]) -> dict[str, float]:
    """Return the last value after step 0 (before training) of each metric of a metrics.jsonl.

    Reads the file from its end, and only as far as needed.
    """
    values: dict[str, float] = {}
    missing = set(names)
    for row in rows_from_the_end(path):
        if row["step"] <= 0:
            break
        values |= {name: row[name] for name in missing if row.get(name) is not None}
        missing -= values.keys()
        if not missing:
            break
    return values


def first_row(path: Path) -> Row:
    """Return the row of step 0, before training, of a metrics.jsonl; empty if it has none."""
    if not path.is_file():
        return {}
    with path.open() as file:
        line = file.readline()
    row = _numbers(json.loads(line)) if line.endswith("\n") else {"step": -1}
    return row if row["step"] == 0 else {}


def totals(path: Path, names: Iterable[str]) -> dict[str, float]:
    """Return the sum over the steps of each metric that a metrics.jsonl has.

    Searches the text: parsing every row takes seven times as long.
    """
    text = path.read_text() if path.is_file() else ""
    found = {name: re.findall(rf'"{re.escape(name)}": ([-+.\de]+)[,}}]', text) for name in names}
    return {name: sum(map(float, values)) for name, values in found.items() if values}


def rows_from_the_end(path: Path) -> Iterator[Row]:
    """Yield the rows of a metrics.jsonl, the last first, without a last line that was cut off.

    Raises:
        DistillError: the file is damaged.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        end = file.seek(0, 2)
        rest, is_last = b"", True
        while end > 0:
            begin = max(0, end - TAIL_BYTES)
            file.seek(begin)
            lines = (file.read(end - begin) + rest).split(b"\n")
            rest, end = (lines.pop(0) if begin else b""), begin
            if is_last and lines:  # after the last newline: nothing, or a line that was cut off
                lines, is_last = lines[:-1], False
            for line in reversed(lines):
                try:
                    row = _numbers(json.loads(line))
                except ValueError as error:
                    raise damaged(path, error) from error
                yield row


def read_config(run: RunDir) -> dict[str, Any]:
    """Return a run's config as dotted keys. Raises ConfigError if the file is damaged."""
    try:
        return flatten(yaml.load(run.config.read_text(), YAML_LOADER))
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"{run.config}: cannot be read as a run's config ({what}); leave that run out") from error


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between configs, except a run's own name and place."""
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith("run."))
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]


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
        return sorted((int(step), file) for step, file in files if step.isdecimal() and file.is_file())

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
    with naming_damage(result.folder):
        return History(
            result=result,
            name=name,
            rows=[_numbers(row) for row in read_metrics(run.metrics)] if run.metrics.is_file() else [],
            config=read_config(run) if run.config.is_file() else {},
            outcome=read_outcome(run),
            memory=(read_json(run.resolved).get("memory") if run.resolved.is_file() else None) or {},
            command=run.command.read_text().strip() if run.command.is_file() else "",
        )


def _numbers(row: Row) -> Row:
    """Return a row without what is no finite number. Raises ValueError if its step is not a whole number."""
    if not isinstance(row["step"], int):
        raise ValueError(f"step {row['step']!r} is not a whole number")
    return {key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}


def _settings(result: RunResult) -> str:
    return short_settings(result.settings) or result.name


def short_settings(settings: dict[str, str]) -> str:
    """Return settings in one line, with the last parts of their keys."""
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in settings.items())


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
