"""The user's view of a run in progress: one greppable line for each step, or a panel on a terminal.

The main rank's standard output is the user's; everything else that a rank prints goes to its log file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import IO

from rich.file_proxy import FileProxy
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from distill_cli.metrics import find
from distill_cli.terminal.console import Console
from distill_cli.terminal.panel import Screen


class StepPrinter:
    """Print a run's progress: a panel on a terminal, else a line each step. Leaving the context removes the panel."""

    def __init__(self, stream: IO[str], *, num_steps: int, every: int = 1, title: str = "distill") -> None:
        width = None if stream.isatty() else 200  # rich wraps at 80 columns if the output is no terminal
        self.console = Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())
        self._every, self.screen = every, Screen(title, num_steps)
        self._live = Live(  # other output of the process goes to a rank's log: no need to redirect it
            self.screen, console=self.console, refresh_per_second=4, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> StepPrinter:
        if self.console.is_terminal:
            for handler in logging.getLogger("distill_cli").handlers:  # print warnings above the panel
                if isinstance(handler, logging.StreamHandler) and handler.stream is self.console.file:
                    handler.setStream(FileProxy(self.console, self.console.file))
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage(self, name: str) -> None:
        """Show the current stage; on a terminal only."""
        self.screen.stage = name

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(escape(text))

    def example(self, parts: Sequence[tuple[str, bool]]) -> None:
        """Print one training sequence: text with a loss is green and in >>> <<<, other text is grey."""
        shown = Text("the first sequence; the loss is on the text in >>> <<<\n", style="dim")
        for text, is_trained in parts:
            shown.append(f">>>{text}<<<" if is_trained else text, style="green" if is_trained else "dim")
        self.console.print(shown)

    def step(self, step: int, metrics: Mapping[str, float], *, at: float | None = None) -> None:
        """Show a finished step, which ended `at` seconds since 1970 (now). A terminal keeps the lines of validations.

        Step 0, before training, is shown if the student was validated.
        """
        validates = "val/accuracy" in metrics
        if step == 0 and not validates:
            return
        self.screen.add(step, metrics, at=at)
        is_due = step % self._every == 0 or step == self.screen.num_steps
        if validates or (is_due and not self.console.is_terminal):
            self.say(step_line(step, self.screen.num_steps, metrics))


def step_line(step: int, num_steps: int | None, metrics: Mapping[str, float]) -> str:
    """Return `step 12/80 loss=0.0312 ...`: the metrics that declare a `step_line`, in the order of `metrics`."""
    known = [(find(key), value) for key, value in metrics.items() if value is not None]
    parts = [metric.step_line.format(value) for metric, value in known if metric and metric.step_line]
    return f"step {step}/{num_steps} " + " ".join(parts)


def log_to(stream: IO[str], *, console: IO[str] | None = None) -> None:
    """Send the package's log records to a rank's log file, with UTC times; warnings also to the user's console."""
    root = logging.getLogger("distill_cli")
    root.handlers = [logging.StreamHandler(stream)]
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    formatter.converter = time.gmtime
    root.handlers[0].setFormatter(formatter)
    if console is not None:
        warnings = logging.StreamHandler(console)
        warnings.setLevel(logging.WARNING)
        warnings.setFormatter(logging.Formatter("warning: %(message)s"))
        root.addHandler(warnings)
    root.setLevel(logging.INFO)
    root.propagate = False
