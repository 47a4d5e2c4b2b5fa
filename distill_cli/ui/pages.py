"""The pages of runs: the report's, made again only if a file of a run has changed."""

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir
from distill_cli.report.html import make_page, packed
from distill_cli.report.read import naming_damage, read_histories, read_results, state_of
from distill_cli.report.samples import Samples, read_samples
from distill_cli.terminal.step_printer import clock
from distill_cli.ui.find import FILES, Found, is_inside, stamps
from distill_cli.ui.listing import Line, Listing

KEPT = 4
"""Pages that are kept."""
LOG_BYTES, LOG_LINES = 1 << 14, 60
"""How much of a log's end is shown."""
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
"""What a terminal would take for commands."""


@dataclass(frozen=True)
class Versions:
    """What changes when files do."""

    page: str
    samples: str
    """Changes with the recorded answers alone."""


@dataclass(frozen=True)
class Shown:
    """A page about some runs, made of the files of a version."""

    versions: Versions
    words: Mapping[str, Any]
    """The variables of page.html."""
    data: str
    """What its figures show, packed."""
    samples: Samples
    answers: str
    """The recorded answers as JSON; null if there are none."""


class Pages:
    """The pages about runs of a listing."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._shown: OrderedDict[tuple[str, ...], Shown] = OrderedDict()
        self._lock = threading.Lock()

    def show(self, chosen: Sequence[Found]) -> Shown:
        """Return the page about these runs and sweeps.

        Raises:
            DistillError: a file is damaged.
        """
        with self._lock:
            names, versions = tuple(found.name for found in chosen), self.versions(chosen)
            old = self._shown.get(names)
            if old is None or old.versions != versions:
                old = _make(chosen, versions, old)
                self._shown[names] = old
            self._shown.move_to_end(names)
            while len(self._shown) > KEPT:
                self._shown.popitem(last=False)
            return old

    def versions(self, chosen: Sequence[Found]) -> Versions:
        """Return the versions of what a page would show now. Reads no file but what tells whether a run is alive."""
        runs, sweeps = runs_of(chosen), [found for found in chosen if found.runs is not None]
        samples = [_rollouts(self._listing.root, run.folder) for run in runs]
        files = [stamps(run.folder, FILES) for run in runs] + [stamps(one.folder, ["sweep.json"]) for one in sweeps]
        states = []
        for run in runs:
            with naming_damage(run.folder):
                states.append(state_of(RunDir(run.folder)))
        return Versions(page=_digest([files, states, samples]), samples=_digest(samples))

    def now(self, chosen: Sequence[Found]) -> dict[str, Any]:
        """Return the state of these runs: a `line`, the `title` of the page, and the versions of what it shows."""
        lines = [self._listing.line(run) for run in runs_of(chosen)]
        line = state_line(lines[0]) if len(lines) == 1 else states_line(lines)
        name = ", ".join(found.folder.name for found in chosen[:3]) + ("" if len(chosen) <= 3 else ", ...")
        of = f" {lines[0].step}/{lines[0].num_steps}" if len(lines) == 1 and lines[0].state == "running" else ""
        title = f"{lines[0].state}{of}" if len(lines) == 1 else line
        log = self._log(chosen)
        return {
            "line": line, "title": f"{title} - {name}", "version": self.versions(chosen).page,
            "log": "" if log is None else _digest([str(log), stamps(log.parent, [log.name])]),
        }  # fmt: skip

    def log(self, chosen: Sequence[Found]) -> str:
        """Return the last lines of the log of rank 0, of the newest attempt of a single run."""
        if (log := self._log(chosen)) is None:
            return ""
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode(errors="replace")
        return "\n".join(CONTROL.sub("", text).splitlines()[-LOG_LINES:])

    def _log(self, chosen: Sequence[Found]) -> Path | None:
        runs = runs_of(chosen)
        log = RunDir(runs[0].folder).newest_attempt().rank_log(0) if len(runs) == 1 else None
        return log if log and log.is_file() and is_inside(self._listing.root, log) else None


def runs_of(chosen: Sequence[Found]) -> list[Found]:
    """Return the runs among these, and those of the sweeps."""
    return [run for found in chosen for run in ([found] if found.runs is None else found.runs)]


def state_line(line: Line) -> str:
    """Return the state of a run in a line."""
    if line.problem:
        return line.problem
    of = f" of {line.num_steps}" if line.num_steps and line.state != "finished" else ""
    parts = [f"{line.state}, step {line.step}{of}" if line.step else line.state, line.stage]
    if line.lasted:
        parts.append(f"{clock(line.lasted)} so far" if line.state == "running" else f"{clock(line.lasted)} in all")
    if line.left is not None:
        parts.append(f"about {clock(line.left)} left")
    return ", ".join(part for part in parts if part)


def states_line(lines: Sequence[Line]) -> str:
    """Return how many of some runs are in which state."""
    states = [line.state or "unreadable" for line in lines]
    return f"{len(lines)} runs: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _make(chosen: Sequence[Found], versions: Versions, old: Shown | None) -> Shown:
    with naming_damage(", ".join(found.name for found in chosen)):
        histories = read_histories(read_results([found.folder for found in chosen]))
        is_old = old is not None and old.versions.samples == versions.samples
        samples = old.samples if old and is_old else read_samples(histories)
        answers = old.answers if old and is_old else json.dumps(samples.shown, allow_nan=False)
        page = make_page(histories, samples)
        return Shown(versions, page.words, packed(page.data), samples, answers)


def _rollouts(root: Path, folder: Path) -> list[object]:
    """Return names and stamps of the recorded answers. Raises DistillError for a link to another place."""
    rollouts = folder / "rollouts"
    entries: list[os.DirEntry[str]] = []
    with suppress(OSError):
        entries = sorted(os.scandir(rollouts), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink() and not is_inside(root, Path(entry.path)):
            raise DistillError(f"{entry.path}: is a link to another place, which is not read; remove it")
    names = [entry.name for entry in entries]
    return [names, stamps(rollouts, names)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
