"""What a user sees while a run goes: one greppable line a step, or a live bar on a terminal.

The main rank's standard output is the user's; everything else that a rank prints goes to its log file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

COLUMNS = (  # what a step's line shows of its metrics, and how
    ("loss", "train/loss", "{:.4f}"),
    ("acc", "rollout/accuracy", "{:.3f}"),
    ("len", "rollout/mean_length", "{:.0f}"),
    ("gnorm", "train/grad_norm", "{:.2f}"),
    ("mismatch", "rollout/engine_mismatch", "{:.1e}"),
    ("packed", "perf/packing_efficiency", "{:.0%}"),
    ("tok/s", "perf/tokens_per_s", "{:.0f}"),
    ("s", "time/step_s", "{:.2f}"),
    ("val", "val/accuracy", "{:.3f}"),
)


class StepPrinter:
    """Says where the run stands. Used as a context: a live bar is taken down on the way out."""

    def __init__(self, stream: IO[str], *, num_steps: int, every: int = 1) -> None:
        # Rich would wrap a line at 80 columns where the output is no terminal.
        width = None if stream.isatty() else 200
        self.console = Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())
        self._num_steps, self._every = num_steps, every
        self._progress: Progress | None = None
        self._task = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("[dim]elapsed"),
                TimeElapsedColumn(),
                TextColumn("[dim]left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> StepPrinter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def stage(self, name: str) -> None:
        """What is happening now; shown on a terminal only."""
        if self._progress is not None:
            if self._task is None:
                self._task = self._progress.add_task(name, total=self._num_steps)
            self._progress.update(self._task, description=f"[bold]{name:<10}")

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)
        if step % self._every == 0 or step == self._num_steps or "val/accuracy" in metrics:
            self.say(step_line(step, self._num_steps, metrics))


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """`step 12/80 loss=0.0312 ...`: what is there of the columns."""
    shown = [f"{name}={form.format(metrics[key])}" for name, key, form in COLUMNS if metrics.get(key) is not None]
    return f"step {step}/{num_steps} " + " ".join(shown)


def log_to(stream: IO[str], *, console: IO[str] | None = None) -> None:
    """Sends the package's log records to a rank's log file, with the time; warnings also to what the user sees."""
    handler = logging.StreamHandler(stream)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger("distill_cli")
    root.handlers = [handler]
    if console is not None:
        shown = logging.StreamHandler(console)
        shown.setLevel(logging.WARNING)
        shown.setFormatter(logging.Formatter("warning: %(message)s"))
        root.addHandler(shown)
    root.setLevel(logging.INFO)
    root.propagate = False
