"""A run's progress: what a checkpoint keeps of it, and the outcome computed from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from distill_cli.folders.attempts import Outcome
from distill_cli.metrics import gap_closed
from distill_cli.train.validation import Score


@dataclass(frozen=True)
class Best:
    """The best value of checkpoint.metric so far, among steps with a checkpoint."""

    metric: str
    value: float
    step: int


@dataclass
class Progress:
    """How far a run is: with weights and optimizer, everything that its next step depends on."""

    step: int = 0
    """The last completed step."""
    seconds: float = 0.0
    bad_updates: int = 0
    """Consecutive updates up to now that were skipped because they were not finite."""
    truncated_steps: int = 0
    """Consecutive steps up to now above rollout.max_truncated_rate."""
    guard_left: int = 0
    """`LengthGuard.left`."""
    before: Score | None = None
    teacher: Score | None = None
    latest: Score | None = None
    """The student's newest validation, after `latest_step`."""
    latest_step: int = -1
    best: Best | None = None
    unrecorded: dict[str, Any] | None = None
    """Metrics of the step after `step`, if the run was stopped in that step's validation: the student has learned from
    it, so a resumed run validates and records it first."""

    @property
    def trained_step(self) -> int:
        """The last step that the student has learned from."""
        return self.step if self.unrecorded is None else self.step + 1

    def note(self, metric: str, value: float | None, *, higher_is_better: bool) -> None:
        """Update `best` with the value of checkpoint.metric at this step, if there is one."""
        best, sign = self.best, 1 if higher_is_better else -1
        if value is not None and (best is None or best.metric != metric or sign * value >= sign * best.value):
            self.best = Best(metric, value, self.step)

    def outcome(self, state: str, reason: str | None, *, seconds: float) -> Outcome:
        """Return the outcome of the run if it ends here."""
        after = self.latest if self.latest_step == self.step > 0 else None
        scores = (self.before, after, self.teacher)
        gap = gap_closed(*(None if score is None else score.accuracy for score in scores))
        parts = [None if part is None else asdict(part) for part in (*scores, self.best)]
        names = dict(zip(("before", "after", "teacher", "best"), parts, strict=True))
        return Outcome(state, reason, self.trained_step, seconds, gap_closed=gap, **names)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """Return the progress that a checkpoint's state holds."""
        kinds = {"before": Score, "teacher": Score, "latest": Score, "best": Best}
        values = {field.name: state[field.name] for field in fields(cls) if field.name != "guard_left"}
        values["guard_left"] = state.get("guard_left", 0)  # checkpoints from before there was a guard lack it
        return cls(**{name: kinds[name](**v) if name in kinds and v else v for name, v in values.items()})
