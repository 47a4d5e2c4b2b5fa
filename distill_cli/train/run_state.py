"""How far a run has come: what a checkpoint remembers of it, and what it comes to in the end."""

from __future__ import annotations

from dataclasses import dataclass, fields

from distill_cli.metrics import gap_closed
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


@dataclass
class Progress:
    """How far a run has come: with weights and optimizer, all that its next step depends on."""

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
    """Metrics of the step after `step`, if the run was stopped in that step's validation: the student has learned from
    it, so a resumed run validates and records it first."""

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

    def result(self, state: str, reason: str | None, *, seconds: float) -> Result:
        """What the run comes to if it ends here."""
        after = self.latest if self.latest_step == self.step > 0 else None
        return Result(state, reason, self.trained_step, seconds, self.before, after, self.teacher, self.best)

    @classmethod
    def of(cls, state: dict) -> Progress:
        """Read a checkpoint's state."""
        kinds = {"before": Score, "teacher": Score, "latest": Score, "best": Best}
        values = {field.name: state[field.name] for field in fields(cls)}
        return cls(**{name: kinds[name](**v) if name in kinds and v else v for name, v in values.items()})
