"""When a run saves, and what a checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from distill_cli.checkpoint.saver import Saver
from distill_cli.folders.metrics_file import plain
from distill_cli.train.run_state import Progress

RANKED = ("train", "rollout", "val")
"""Kinds of metrics that a checkpoint keeps: what checkpoints can be ranked by."""


@dataclass(frozen=True)
class Checkpoints:
    """A run's checkpoints. Every rank has one and saves at the same steps: a collective."""

    saver: Saver
    period: int
    """Steps between two."""
    metric: str
    """The best value of this metric is noted with its step."""
    higher_is_better: bool
    fingerprint: str | None
    """Identifies the data, whose order a resumed run relies on; None if that is not known."""

    def is_due(self, step: int) -> bool:
        return step % self.period == 0

    def save(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Save the last step that the student has learned from, whose metrics these are."""
        ranked = {name: plain(value) for name, value in metrics.items() if name.startswith(RANKED)}
        progress.note(self.metric, ranked.get(self.metric), higher_is_better=self.higher_is_better)
        state = {**asdict(progress), "metrics": ranked, "data": self.fingerprint}
        self.saver.save(progress.trained_step, state)

    @property
    def last_step(self) -> int:
        """The newest step that was saved, or that the run went on from."""
        return self.saver.last_step

    def close(self) -> None:
        """Block until the pending checkpoint is on disk."""
        self.saver.close()
