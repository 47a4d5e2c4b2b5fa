"""Send new rows and files of a run's folder to a tracker, in a thread.

The thread belongs to the process that launched the ranks, not to a rank: a slow or absent server cannot affect
training, and what dead ranks had recorded is still sent. What could not be sent is sent when the server answers again,
or by `distill track sync`. `<tracker>.json` in the run's folder records what was sent, so that another process can take
over, and a step that a resumed run repeats is not sent twice. If a process was killed during a request, the next one
queries what the tracker has.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_cli.checkpoint import store
from distill_cli.config.credentials import without_credentials
from distill_cli.folders.lock import hold
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.track.base import Tracker

log = logging.getLogger(__name__)

BATCH = 900
"""Metrics per call of `Tracker.log`, at most, unless one step has more."""
MODEL = "student/**/*"
"""Files of the trained student, which become `model/...`."""
AWAY_S = 3.0
"""How long the end of a run waits for a tracker that does not answer."""

Seen = set[tuple[str, int]]
"""Metrics and steps that a tracker has."""


@dataclass
class State:
    """What a tracker has of a run: `<tracker>.json`."""

    file: Path
    identity: dict[str, Any]
    step: dict[str, int] = field(default_factory=dict)
    """The last step that was sent of each of `STREAMS`."""
    is_sure: bool = False
    """Whether the tracker has nothing beyond `step`: False during a request."""
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    """Size and modification time of each file that was sent."""
    end: str | None = None
    """The status that the run was closed with, or will be."""
    is_closed: bool = False
    """Whether it was: all of the run has arrived."""

    @classmethod
    def of(cls, run: RunDir, tracker: Tracker) -> State:
        """Read it. If the tracker's place has changed (another server), nothing has been sent yet."""
        saved = recorded(run, tracker.name)
        identity = tracker.identity(saved)
        kept = PROGRESS if identity.items() <= saved.items() else ("end",)
        progress = {name: saved[name] for name in kept if name in saved}
        return cls(run.path / f"{tracker.name}.json", identity, **progress)

    def save(self) -> None:
        """Write it, if it differs from the file."""
        content = {**self.identity, **{name: getattr(self, name) for name in PROGRESS}}
        if not self.file.exists() or read_json(self.file) != content:
            write_json(self.file, content)


PROGRESS = ("step", "is_sure", "artifacts", "end", "is_closed")


def recorded(run: RunDir, name: str) -> dict[str, Any]:
    """Return what is recorded of a run at a tracker: the state, or else the identity, which checkpoints have too."""
    file = run.path / f"{name}.json"
    if file.exists():
        return read_json(file)
    if run.trackers.exists():
        return read_json(run.trackers).get(name, {})
    newest = store.find(run.checkpoints)[-1:]
    return newest[0].state.get("trackers", {}).get(name, {}) if newest else {}


def ship(run: RunDir, tracker: Tracker, *, begin: bool = False, end: str | None = None) -> tuple[int, int]:
    """Send what the run's folder holds and the tracker lacks; return how many metrics and how many files that was.

    Args:
        begin: mark the run as running, whatever its status was.
        end: the status to close the run with, once its metrics and files are sent.
    """
    with hold(run.path / f".{tracker.name}.lock", wait_s=math.inf):
        state = State.of(run, tracker)
        if begin or end is not None:
            state.end, state.is_closed = end, False
        state.save()  # if this process is killed in `open`, the next one finds the new run by its identity
        tracker.open(state.identity, running=begin and end is None)
        state.save()
        seen = set() if state.is_sure else tracker.logged()
        streams = [file for file in map(run.path.joinpath, tracker.streams) if file.exists()]
        num_metrics = sum(_send_metrics(tracker, file, state, seen) for file in streams)
        state.is_sure = True
        state.save()
        try:
            num_files = _send_artifacts(tracker, run, state)
        finally:
            if end is not None:
                tracker.close(end)
        state.is_closed = end is not None
        state.save()
        return num_metrics, num_files


def _send_metrics(tracker: Tracker, file: Path, state: State, seen: Seen) -> int:
    sent = 0
    for rows in _batches(read_metrics(file, after_step=state.step.get(file.name, -1)), seen):
        if num_values := sum(len(row) - 2 for row in rows):
            state.is_sure = False
            state.save()
            tracker.log(rows)
            sent += num_values
        state.step[file.name], state.is_sure = int(rows[-1]["step"]), not seen
        state.save()
    # A run that went back to a checkpoint repeats steps that the tracker has.
    last = max((step for key, step in seen if key.startswith("system/") == (file.name == "system.jsonl")), default=-1)
    state.step[file.name] = max(last, state.step.get(file.name, -1))
    return sent


def _batches(rows: Iterable[Mapping[str, Any]], seen: Seen) -> Iterator[list[dict[str, float]]]:
    """Yield rows in batches, without values that are null or `seen`."""
    batch: list[dict[str, float]] = []
    for row in rows:
        new = {key: value for key, value in row.items() if value is not None and (key, row["step"]) not in seen}
        if batch and sum(map(len, batch)) + len(new) > BATCH:
            yield batch
            batch = []
        batch.append(new)
    if batch:
        yield batch


def _send_artifacts(tracker: Tracker, run: RunDir, state: State) -> int:
    """Send files that are new, or have changed since they were sent; return their number."""
    patterns, sent = (*tracker.files, *([MODEL] if tracker.logs_model and run.outcome.exists() else [])), 0
    for file in (file for pattern in patterns for file in sorted(run.path.glob(pattern)) if file.is_file()):
        name, stat = str(file.relative_to(run.path)), file.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        if state.artifacts.get(name) != mark:
            tracker.artifact(file, name.replace("student/", "model/", 1))
            state.artifacts[name] = mark
            state.save()
            sent += 1
    return sent


class Shipper:
    """The thread of one tracker."""

    def __init__(self, run: RunDir, tracker: Tracker, *, period_s: float = 2.0) -> None:
        self._run, self.tracker, self._period_s = run, tracker, period_s
        self._where = f"{tracker.label} at {tracker.place}"
        self._closing, self._status, self._deadline = threading.Event(), "finished", math.inf
        self._is_away = self._sent = False
        state = State.of(run, tracker)
        state.save()  # if the server never answers, `distill track sync` reads there where to send the run
        self.identity = state.identity
        self._thread = threading.Thread(target=self._loop, name=tracker.name, daemon=True)
        self._thread.start()

    def end(self, status: str, *, timeout_s: float) -> None:
        """Start sending the rest, with the run's end: `finished`, `stopped` or `failed`."""
        self._status = status
        self._deadline = time.monotonic() + (min(timeout_s, AWAY_S) if self._is_away else timeout_s)
        self._closing.set()

    def wait(self) -> bool:
        """Block until everything is sent or the time is up; return whether everything was sent."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if not self._sent:
            log.warning("%s lacks some of the run; distill track sync %s sends the rest", self._where, self._run.path)
        return self._sent

    def _loop(self) -> None:
        wait_s, begin, give_up = self._period_s, True, math.inf
        while not self._sent and time.monotonic() < give_up:
            # The first call takes seconds, most of them to import the client, while the ranks' imports occupy one core.
            last = self._closing.wait(wait_s)
            try:
                ship(self._run, self.tracker, begin=begin, end=self._status if last else None)
                wait_s, begin, self._is_away, self._sent = self._period_s, False, False, last
            except Exception as error:  # whatever a server or a database raises: training goes on
                wait_s = min(wait_s * 2, 30.0)
                if not self._is_away:
                    log.warning("%s: %s; the run goes on, the rest is sent later", self._where, reason(error))
                self._is_away = True
                if last:
                    give_up = min(give_up, time.monotonic() + AWAY_S)
                    time.sleep(0.5)


def reason(error: Exception) -> str:
    """Return the first line of an error, without the credentials that it may quote."""
    text = str(error).strip() or type(error).__name__
    return without_credentials(text.splitlines()[0])[:300]
