"""What a rank says of its run: metrics.jsonl, the user's terminal, and one sequence as it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.types import Rollout


@dataclass(frozen=True)
class RunLog:
    """Every rank has one; only the main rank's reaches the user."""

    printer: StepPrinter
    metrics_file: MetricsFile | None
    """The main rank's."""
    show: Callable[[list[int]], str]
    """Makes text of token ids, special tokens too."""

    def example(self, rollout: Rollout) -> None:
        """Print a sequence, with what the loss is on."""
        self.printer.example(example_parts(rollout, self.show))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step; print them unless it is a baseline that measured nothing."""
        if self.metrics_file is not None:
            self.metrics_file.write(step, metrics)
        if step > 0 or "val/accuracy" in metrics:
            self.printer.step(step, metrics)

    def flush(self) -> None:
        """Write what waits for room on the disk, if there is some."""
        if self.metrics_file is not None:
            with suppress(OSError):  # warned of when its rows were written
                self.metrics_file.flush()

    def close(self) -> None:
        if self.metrics_file is not None:
            self.metrics_file.close()


def example_parts(rollout: Rollout, show: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """Return a sequence in pieces, each with whether the loss is on it: prompt, answer, observations."""
    ids = rollout.sample.token_ids
    marked = zip(ids, rollout.sample.trained or [True] * len(ids), strict=True)
    pieces = [(show([token for token, _ in run]), key) for key, run in groupby(marked, key=lambda pair: pair[1])]
    return [(show(rollout.prompt.token_ids), False), *pieces]
