"""The list of runs: a line of facts for each, read again only if its files have changed."""

import json
import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path

from distill_cli.errors import DistillError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.run_dir import RunDir, read_json
from distill_cli.report.read import (
    DAMAGE,
    first_row,
    last_values,
    naming_damage,
    read_config,
    rows_from_the_end,
    short_settings,
    state_of,
)
from distill_cli.report.sections import teachers
from distill_cli.terminal.step_printer import PACE_STEPS, seconds_left
from distill_cli.ui.find import FILES, Found, find_runs, is_run, stamps, walk

READING = "being read"
LONGEST = 200
"""Characters of a text in the list."""


@dataclass(frozen=True)
class Line:
    """What the list shows of a run or a sweep. Times are in seconds."""

    name: str
    query: str
    """The part of an address that names it."""
    title: str
    sweep: str = ""
    """The sweep that a run belongs to."""
    is_sweep: bool = False
    keys: tuple[str, ...] = ()
    """The swept keys of a sweep."""
    problem: str = ""
    """Why the rest is not known; empty if it is."""
    has_page: bool = True
    state: str = ""
    stage: str = ""
    """What a running run does now."""
    step: int = 0
    num_steps: int | None = None
    left: float | None = None
    """Time left of a running run."""
    student: str = ""
    teacher: str = ""
    loss: str = ""
    before: float | None = None
    """Held-out accuracy before training."""
    after: float | None = None
    """Held-out accuracy at the last validation."""
    goal: float | None = None
    """The teacher's held-out accuracy."""
    kl: float | None = None
    """KL forward of the last step."""
    began: float | None = None
    """Since 1970."""
    lasted: float | None = None
    """Until its end, or its last step so far."""


class Listing:
    """The runs and sweeps below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._known: dict[str, Found] = {}
        self._lines: dict[str, tuple[object, Line]] = {}
        """The newest line of each run, and the stamps of what it was read from."""
        self._lock = threading.Lock()

    def lines(self, *, within_s: float = math.inf) -> list[Line]:
        """Return the line of each run and sweep, a sweep before its runs.

        Runs that were never read take `within_s` at most; the rest of them have the state READING, until the next call.
        """
        with self._lock:
            self._known = known = find_runs(self.root)
            self._lines = {name: line for name, line in self._lines.items() if name in known}
            spent, lines = 0.0, []
            for found in known.values():
                is_new, began = found.name not in self._lines, time.monotonic()
                if is_new and spent > within_s and found.runs is None:
                    lines.append(replace(_named(found), state=READING))
                    continue
                lines.append(self._line(found))
                spent += time.monotonic() - began if is_new else 0.0
            return lines

    def line(self, found: Found) -> Line:
        """Return the line of a run as it is now."""
        with self._lock:
            return self._line(found)

    def find(self, name: str) -> Found | None:
        """Return a run or a sweep as it is now; None if there is none of this name, or it is not to be read."""
        if name not in self._known:
            self._known = find_runs(self.root)
        if (known := self._known.get(name)) is None:
            return None
        top = self._known[known.sweep] if known.sweep else known
        if top.folder.resolve() != top.folder:  # a link has taken its place
            return None
        found = {one.name: one for one in walk(self.root, top.folder)}.get(name)
        return found if found and not found.problem and (found.runs is not None or is_run(found.folder)) else None

    def _line(self, found: Found) -> Line:
        if found.runs is not None or found.problem:
            return _named(found)
        files = stamps(found.folder, FILES)
        has_ended = files[-1] is not None
        stamp: tuple[object, object] = (files, None)
        try:
            with naming_damage(found.folder):
                stamp = stamp if has_ended else (files, _signs_of_life(found.folder))
                old, line = self._lines.get(found.name, (None, None))
                if line is None or old != stamp:
                    line = summarize(found)
                    json.dumps(vars(line), allow_nan=False)  # ValueError: a number is infinite
        except DistillError as error:
            line = replace(_named(found), problem=str(error), has_page=False)
        self._lines[found.name] = stamp, line
        return line


def _signs_of_life(folder: Path) -> tuple[str, tuple[str, int] | None]:
    """Return a run's state, and its stage with its number of steps."""
    run = RunDir(folder)
    return state_of(run), run.newest_attempt().now()


def summarize(found: Found) -> Line:
    """Read the line of a run."""
    run, (state, now) = RunDir(found.folder), _signs_of_life(found.folder)
    config, outcome = read_config(run) if run.config.is_file() else {}, read_outcome(run)
    recent = [row for row in islice(rows_from_the_end(run.metrics), PACE_STEPS + 1) if row["step"] > 0]
    times, step = [row["time"] for row in reversed(recent)], recent[0]["step"] if recent else 0
    first, last = first_row(run.metrics), last_values(run.metrics, ["val/accuracy", "train/kl_forward"])
    num_steps, began = now[1] if now else config.get("train.max_steps"), _began(run)
    lasted = outcome.seconds if outcome else times[-1] - began if times and began else None
    is_running = state == "running"
    return replace(
        _named(found),
        has_page=is_run(found.folder),
        state=_short(state),
        stage=_short(now[0]) if now and is_running else "",
        step=int(outcome.num_steps) if outcome else step,
        num_steps=num_steps if isinstance(num_steps, int) else None,
        left=seconds_left(times, step=step, num_steps=num_steps) if is_running else None,
        student=_model(config.get("model.student.path")),
        teacher=_model(teachers(config)),
        loss=_short(config.get("loss.kl_type")),
        before=first.get("val/accuracy"),
        after=last.get("val/accuracy"),
        goal=first.get("val/teacher_accuracy"),
        kl=last.get("train/kl_forward"),
        began=began,
        lasted=None if lasted is None else max(float(lasted), 0.0),
    )


def _named(found: Found) -> Line:
    """Return a line without what its files say."""
    title = short_settings(found.settings) or (found.folder.name if found.name == "." else found.name)
    keys = tuple(dict.fromkeys(key for run in found.runs or () for key in run.settings))
    is_sweep, has_page = found.runs is not None, not found.problem
    return Line(found.name, found.query, _short(title), found.sweep, is_sweep, keys, found.problem, has_page)


def _model(path: object) -> str:
    """Return the name of a model by its path; of several models, all names."""
    return _short(", ".join(part.rstrip("/").rpartition("/")[2] for part in str(path or "").split(", ")))


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _began(run: RunDir) -> float | None:
    """Return when a run was started, or when its config was written if nothing says that."""
    with suppress(*DAMAGE):
        return datetime.strptime(read_json(run.path / "env.json")["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return run.config.stat().st_mtime if run.config.is_file() else None
