"""The result of a run, of several, or of a sweep, read from their folders: the last value of each metric.

Only the end of a metrics.jsonl is read, so that a sweep of a thousand runs is compared in seconds.
"""

import json
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from distill_cli.config.fields import flatten
from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.metrics_file import damaged
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.metrics import METRICS

COMPARED = [metric for metric in METRICS if metric.compared_in]
"""The metrics that runs are compared by."""
TAIL_BYTES = 1 << 16
"""Bytes that are read at a time from the end of a metrics.jsonl."""


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
    """The last value after step 0 of each metric of `COMPARED`."""

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
    return [
        _read_run(
            sweep.path / element.folder, dict(override.lstrip("+").split("=", 1) for override in element.overrides)
        )
        for element in sweep.elements()
    ]


def _read_run(folder: Path, settings: dict[str, str]) -> RunResult:
    run = RunDir(folder)
    final = last_values(run.metrics, ["step", *(metric.name for metric in COMPARED)])
    return RunResult(folder, settings, state_of(run), int(final.pop("step", 0)), final)


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
    for row in _rows_from_the_end(path):
        if row["step"] <= 0 or not missing:
            break
        values |= {name: row[name] for name in missing if row.get(name) is not None}
        missing -= values.keys()
    return values


def _rows_from_the_end(path: Path) -> Iterator[dict[str, Any]]:
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
            try:
                yield from [json.loads(line) for line in reversed(lines)]
            except ValueError as error:
                raise damaged(path, error) from error


def read_config(run: RunDir) -> dict[str, Any]:
    """Return a run's config as dotted keys. Raises ConfigError if the file is damaged."""
    try:
        return flatten(yaml.safe_load(run.config.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"{run.config}: cannot be read as a run's config ({what}); leave that run out") from error


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between configs, except a run's own name and place."""
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith("run."))
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
