"""How far a run has come: what a checkpoint remembers of it, what it came to, and where a step's time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from distill_cli.metrics import STAGES, gap_closed
from distill_cli.train.validation import Score


@dataclass(frozen=True)
class Best:
    """The best value of checkpoint.metric so far, of the steps with a checkpoint."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Result:
    """What a finished run comes to."""

    state: str
    """`finished`, or `stopped` where it was asked to stop and can go on."""
    reason: str | None
    """Why it stopped."""
    num_steps: int
    """Steps that are done."""
    seconds: float
    """Of all attempts, as far as their steps were kept."""
    before: Score | None
    after: Score | None
    teacher: Score | None
    best: Best | None = None

    @property
    def gap_closed(self) -> float | None:
        """See `metrics.gap_closed`."""
        return gap_closed(*(score and score.accuracy for score in (self.before, self.after, self.teacher)))


class StopRequested(Exception):
    """The run is to end after the last step that is done; all ranks raise it together."""


@dataclass
class Progress:
    """How far a run has come: with the weights and the optimizer, all that its next step depends on."""

    step: int = 0
    """The last one that is done."""
    seconds: float = 0.0
    bad_updates: int = 0
    """Updates in a row, up to now, that were skipped since they were not finite."""
    truncated_steps: int = 0
    """Steps in a row, up to now, above rollout.max_truncated_rate."""
    before: Score | None = None
    teacher: Score | None = None
    latest: Score | None = None
    """The student's newest validation, and its step."""
    latest_step: int = -1
    best: Best | None = None
    unrecorded: dict[str, float] | None = None
    """Metrics of the step after `step`, where the run was asked to stop in that step's validation: the student has
    learned from it, and it is validated again and recorded first."""

    @property
    def trained_step(self) -> int:
        """The last one that the student has learned from."""
        return self.step if self.unrecorded is None else self.step + 1

    def note(self, metric: str, value: float | None, *, higher_is_better: bool) -> None:
        """The value of checkpoint.metric at this step."""
        if value is None:
            return
        sign = 1 if higher_is_better else -1
        if self.best is None or self.best.metric != metric or sign * value >= sign * self.best.value:
            self.best = Best(metric, value, self.step)

    @classmethod
    def of(cls, state: dict) -> Progress:
        """From a checkpoint's state."""
        kinds = {"before": Score, "teacher": Score, "latest": Score, "best": Best}
        values = {field.name: state[field.name] for field in fields(cls)}
        return cls(**{name: kinds[name](**v) if name in kinds and v else v for name, v in values.items()})


class Stopwatch:
    """Seconds by stage of the current step."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._on_stage = on_stage

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        assert stage in STAGES, stage
        self._on_stage(stage)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """`time/<stage>_s` since the last lap."""
        metrics = {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
        self.seconds.clear()
        return metrics
