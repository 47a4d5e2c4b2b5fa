"""Record how each attempt of a run began and ended, and the run's outcome.

`logs/attempt_<n>/attempt.json` is written by the process that starts the ranks, `outcome.json` by the main rank.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from distill_cli.errors import DistillError
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, read_json, write_json

SHOWN = 5
"""How many of a run's attempts a summary lists."""


@dataclass
class Attempt:
    """Times are in seconds since 1970."""

    number: int
    launched: float
    """When the command began; several attempts may follow one another."""
    began: float
    from_step: int
    """Step of the checkpoint from which it began; 0 is the beginning."""
    ended: float | None = None
    step: int | None = None
    """The last step that it recorded."""
    reason: str | None = None
    """Why it ended; None while it lasts, or if its launcher was killed."""

    def __str__(self) -> str:
        if self.reason is None:
            return f"attempt {self.number}: its launcher was killed, or its disk was full"
        return f"attempt {self.number}, after step {self.step}: {self.reason.partition('; log: ')[0]}"


@contextmanager
def record_attempt(run: RunDir, *, launched: float, from_step: int) -> Iterator[None]:
    """Keep the record of the attempt that takes place in this context."""
    attempt = Attempt(run.attempt, launched, time.time(), from_step)
    write_json(run.attempt_record, asdict(attempt))
    try:
        yield
        reason = read_json(run.outcome)["reason"]
        attempt.reason = f"stopped by {reason}" if reason else "finished"
    except BaseException as error:
        what = str(error) or type(error).__name__
        attempt.reason = what if isinstance(error, DistillError) else f"stopped by {what}"
        raise
    finally:
        attempt.ended = time.time()
        with suppress(OSError):  # a full disk must not hide why the attempt ended
            attempt.step = max((int(row["step"]) for row in read_metrics(run.metrics)), default=0)
            write_json(run.attempt_record, asdict(attempt))


def attempts_of(run: RunDir) -> list[Attempt]:
    """Return all attempts that began, oldest first."""
    found = []
    for file in run.path.glob("logs/attempt_*/attempt.json"):
        with suppress(ValueError, TypeError):
            found.append(Attempt(**read_json(file)))
    return sorted(found, key=lambda attempt: attempt.number)


def attempt_lines(attempts: list[Attempt]) -> list[str]:
    """Return a line for each of the last few, and how many there were before."""
    lines = [str(attempt) for attempt in attempts[-SHOWN:]]
    return [f"({len(attempts) - SHOWN} before)", *lines] if len(attempts) > SHOWN else lines


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run, which the main rank writes to outcome.json when it ends."""

    state: str
    """`finished`, or `stopped` if a signal or a limit ended the run, which can be resumed."""
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
    """Return the outcome that the ranks wrote; None if there is none."""
    if not run.outcome.is_file():
        return None
    content = read_json(run.outcome)
    return Outcome(**{field.name: content[field.name] for field in fields(Outcome) if field.name in content})


def finished_steps(run: RunDir) -> int:
    """Return how many steps a finished run has made; -1 if it has not finished."""
    outcome = read_outcome(run)
    return outcome.num_steps if outcome and outcome.is_finished else -1


def write_outcome(run: RunDir) -> Outcome | None:
    """Add the attempts to `outcome.json`; return the outcome, None if there is none."""
    if run.outcome.is_file():
        write_json(run.outcome, read_json(run.outcome) | {"attempts": [asdict(one) for one in attempts_of(run)]})
    return read_outcome(run)
