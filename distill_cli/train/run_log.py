"""What a rank says of its run: metrics.jsonl, the user's terminal, and one sequence as it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from typing import IO

from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.run_dir import RunDir
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.types import Rollout


class RunLog:
    """Every rank has one; only the main rank's reaches the user."""

    def __init__(
        self,
        run: RunDir,
        console: IO[str],
        *,
        num_steps: int,
        is_main: bool,
        show: Callable[[list[int]], str],
        print_every: int = 1,
    ) -> None:
        """`show` makes text of token ids, special tokens too."""
        self.printer = StepPrinter(console, num_steps=num_steps, every=print_every)
        self._run, self._num_steps, self._show = run, num_steps, show
        self._file = MetricsFile(run.metrics) if is_main else None

    def stage(self, stage: str) -> None:
        """Note that a stage of a step begins: on a terminal, and as a sign of life."""
        self.printer.stage(stage)
        if self._file is not None:
            self._run.beat(f"{stage} {self._num_steps}")

    def example(self, rollout: Rollout) -> None:
        """Print a sequence, with what the loss is on."""
        self.printer.example(example_parts(rollout, self._show))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step; print them unless it is a baseline that measured nothing."""
        if self._file is not None:
            self._file.write(step, metrics)
        if step > 0 or "val/accuracy" in metrics:
            self.printer.step(step, metrics)

    def flush(self) -> None:
        """Write what waits for room on the disk, if there is some."""
        if self._file is not None:
            with suppress(OSError):  # warned of when its rows were written
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def example_parts(rollout: Rollout, show: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """Return a sequence in pieces, each with whether the loss is on it: prompt, answer, observations."""
    ids = rollout.sample.token_ids
    marked = zip(ids, rollout.sample.trained or [True] * len(ids), strict=True)
    pieces = [(show([token for token, _ in run]), key) for key, run in groupby(marked, key=lambda pair: pair[1])]
    return [(show(rollout.prompt.token_ids), False), *pieces]
