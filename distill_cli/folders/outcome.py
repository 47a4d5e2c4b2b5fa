"""What the ranks of a run write down when they end: `outcome.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from distill_cli.folders.attempts import attempts_of
from distill_cli.folders.run_dir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Outcome:
    """The main rank writes a `train.run_state.Result`; this is its torch-free reader."""

    state: str
    """`finished`, or `stopped` if the run was asked to stop and can go on."""
    reason: str | None = None
    """Why it stopped."""
    num_steps: int = 0
    seconds: float = 0.0
    before: dict[str, Any] | None = None
    """Scores: the student's before and after training, and the teacher's."""
    after: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    gap_closed: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"


def read_outcome(run: RunDir) -> Outcome | None:
    """Return what the ranks wrote; None if they did not come to it."""
    if not run.outcome.is_file():
        return None
    content = read_json(run.outcome)
    return Outcome(**{field.name: content[field.name] for field in fields(Outcome) if field.name in content})


def add_attempts(run: RunDir) -> Outcome | None:
    """Add how each attempt ended to `outcome.json`; return what it says."""
    if run.outcome.is_file():
        attempts = [asdict(attempt) for attempt in attempts_of(run)]
        write_json(run.outcome, read_json(run.outcome) | {"attempts": attempts})
    return read_outcome(run)
