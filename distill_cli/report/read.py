"""What came of runs, read from their folders: the last value of each measure, for one run, several, or a sweep.

Of a metrics.jsonl only the end is read, so that a sweep of a thousand runs is compared in seconds.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.metrics_file import damaged
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.metrics import METRICS

COMPARED = [metric for metric in METRICS if metric.compared_in]
"""The metrics that runs are compared by."""
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunResult:
    """One run, as far as it has come."""

    folder: Path
    settings: dict[str, str]
    """What tells it from the runs it is compared with: keys as typed, and their values."""
    state: str
    """`waiting`, `running`, `finished`, `stopped` or `failed`."""
    step: int
    """The last one that is recorded; 0 where none is."""
    final: dict[str, float]
    """The last value of each metric of `COMPARED` that was recorded after training began."""

    @property
    def name(self) -> str:
        return self.folder.name


def read_results(paths: Sequence[Path]) -> list[RunResult]:
    """Every run in these folders, each of a run or of a sweep.

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
            what = "no such folder" if not path.exists() else "neither a run (config.yaml) nor a sweep (sweep.json)"
            raise ConfigError(f"{path}: {what}; give the folder of a run or a sweep, such as runs/latest")
    configs = [read_config(RunDir(path)) for path in single]
    return results + [read_run(path, settings) for path, settings in zip(single, _differences(configs), strict=True)]


def read_sweep(sweep: SweepDir) -> list[RunResult]:
    """The runs of a sweep, in its order; those that have not begun are `waiting`."""
    return [
        read_run(sweep.path / element.folder, dict(_key_and_value(override) for override in element.overrides))
        for element in sweep.elements()
    ]


def read_run(folder: Path, settings: dict[str, str]) -> RunResult:
    run = RunDir(folder)
    final = last_values(run.metrics, [metric.name for metric in COMPARED])
    step = last_values(run.metrics, ["step"]).get("step", 0)
    return RunResult(folder=folder, settings=settings, state=state_of(run), step=int(step), final=final)


def state_of(run: RunDir) -> str:
    """How far a run has come, by what is in its folder."""
    if outcome := read_outcome(run):
        return outcome.state
    if not run.config.is_file() or run.is_new():
        return "waiting"
    if _is_held(run):
        return "running"
    return "waiting" if run.open_job() else "failed"


def _is_held(run: RunDir) -> bool:
    """Whether a living process holds the folder. Of a process on another host this is not known: it counts as alive."""
    holder = run.holder()
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    return bool(holder) and (found is None or found[2] != platform.node() or psutil.pid_exists(int(found[1])))


def last_values(path: Path, names: Iterable[str]) -> dict[str, float]:
    """The last value of each metric of a metrics.jsonl after step 0, which is before training.

    The file is read from its end, and only as far as needed.
    """
    found: dict[str, float] = {}
    missing = set(names)
    for row in _rows_from_the_end(path):
        if row["step"] <= 0 or not missing:
            break
        new = {name: row[name] for name in missing if row.get(name) is not None}
        found |= new
        missing -= new.keys()
    return found


def _rows_from_the_end(path: Path) -> Iterable[dict[str, Any]]:
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
            if is_last and lines:  # what follows the last line's end: nothing, or a line that is cut off
                lines, is_last = lines[:-1], False
            try:
                yield from [json.loads(line) for line in reversed(lines)]
            except ValueError as error:
                raise damaged(path, error) from error


def read_config(run: RunDir) -> dict[str, Any]:
    """A run's configuration as dotted keys; ConfigError where its file is damaged."""
    try:
        return flat(yaml.safe_load(run.config.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"{run.config}: cannot be read as a run's config ({what}); leave that run out") from error


def _differences(configs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """For each config the keys whose values are not the same in all."""
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    return [{key: str(config.get(key)) for key in differing if not key.startswith("run.")} for config in configs]


def flat(node: Any, at: str = "") -> dict[str, Any]:
    """A nested config as dotted keys."""
    if not isinstance(node, dict) or not node:
        return {at: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{at}.{key}" if at else str(key))
    return found


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+").partition("=")
    return key, value
