"""How each attempt of a run began and ended: `logs/attempt_<n>/attempt.json`, written by its launcher."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from distill_cli.errors import DistillError
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, write_json

SHOWN = 5
"""How many of a run's attempts a summary tells of."""


@dataclass
class Attempt:
    """Times are in seconds since 1970."""

    number: int
    launched: float
    """When the command was typed: several attempts may follow one another."""
    began: float
    from_step: int
    """Step of the checkpoint from which it began; 0 is the beginning."""
    ended: float | None = None
    step: int | None = None
    """The last step that it recorded."""
    reason: str | None = None
    """Why it ended; None while it lasts, or where its launcher was killed."""

    def __str__(self) -> str:
        if self.reason is None:
            return f"attempt {self.number}: its launcher was killed, or its disk was full"
        return f"attempt {self.number}, after step {self.step}: {self.reason.partition('; log: ')[0]}"


@contextmanager
def record_attempt(run: RunDir, *, launched: float, from_step: int) -> Iterator[None]:
    """Keep the record of the attempt that happens inside."""
    attempt = Attempt(run.attempt, launched, time.time(), from_step)
    write_json(run.attempt_record, asdict(attempt))
    try:
        yield
        outcome = json.loads(run.outcome.read_text())
        attempt.reason = f"stopped by {outcome['reason']}" if outcome["reason"] else "finished"
    except BaseException as error:
        what = str(error) or type(error).__name__
        attempt.reason = what if isinstance(error, DistillError) else f"stopped by {what}"
        raise
    finally:
        attempt.ended = time.time()
        with suppress(OSError):  # of a full disk: what ended the attempt is said all the same
            attempt.step = max((row["step"] for row in read_metrics(run.metrics)), default=0)
            write_json(run.attempt_record, asdict(attempt))


def attempts_of(run: RunDir) -> list[Attempt]:
    """Return all attempts that began, oldest first."""
    found = []
    for file in run.path.glob("logs/attempt_*/attempt.json"):
        with suppress(ValueError, TypeError):
            found.append(Attempt(**json.loads(file.read_text())))
    return sorted(found, key=lambda attempt: attempt.number)


def launched(run: RunDir) -> float:
    """Return the launch time of the command this attempt belongs to."""
    return json.loads(run.attempt_record.read_text())["launched"]


def attempt_lines(attempts: list[Attempt]) -> list[str]:
    """Return a line for each of the last few, and how many there were before."""
    lines = [str(attempt) for attempt in attempts[-SHOWN:]]
    return [f"({len(attempts) - SHOWN} before)", *lines] if len(attempts) > SHOWN else lines
