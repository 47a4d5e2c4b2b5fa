"""Record a rank's run: metrics.jsonl, the terminal, and the first trained sequence token by token."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.run_dir import RunDir
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.types import Rollout


@dataclass
class RunLog:
    """Build one on every rank; only the main rank's writes to the file and reaches the user."""

    run: RunDir
    printer: StepPrinter
    file: MetricsFile | None
    """None on all ranks but the main one."""
    num_steps: int
    show: Callable[[list[int]], str]
    """Returns the text of token ids, special tokens included."""

    def stage(self, stage: str) -> None:
        """Note that a stage of a step begins: on a terminal, and as a sign of life."""
        self.printer.stage(stage)
        if self.file is not None:
            self.run.beat(f"{stage} {self.num_steps}")

    def example(self, rollout: Rollout) -> None:
        """Print a sequence in parts (prompt, turns, observations), marking those with loss."""
        sample = rollout.sample
        tokens = zip(sample.token_ids, sample.trained or [True] * len(sample.token_ids), strict=True)
        parts = [(self.show([token for token, _ in part]), is_on) for is_on, part in groupby(tokens, itemgetter(1))]
        self.printer.example([(self.show(rollout.prompt.token_ids), False), *parts])

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write and print the metrics of a step."""
        if self.file is not None:
            self.file.write(step, metrics)
        self.printer.step(step, metrics)

    def flush(self) -> None:
        """Write rows that waited for disk space, if there is some now."""
        if self.file is not None:
            with suppress(OSError):  # a warning was logged when the rows were written
                self.file.flush()

    def close(self) -> None:
        """Close the file with all rows on disk."""
        if self.file is not None:
            self.file.close()
