"""What a user sees while a run goes: one greppable line a step, or a panel on a terminal.

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
    """Says where the run stands: a panel on a terminal, a line a step elsewhere. A context: it is taken down after."""

    def __init__(self, stream: IO[str], *, num_steps: int, every: int = 1, title: str = "distill") -> None:
        # Rich would wrap a line at 80 columns where the output is no terminal.
        width = None if stream.isatty() else 200
        self.console = Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())
        self._num_steps, self._every = num_steps, every
        self.screen = Screen(title, num_steps)
        self._live: Live | None = None
        if self.console.is_terminal:
            quiet = {"redirect_stdout": False, "redirect_stderr": False}  # what else is printed goes to a rank's log
            self._live = Live(self.screen, console=self.console, refresh_per_second=4, transient=True, **quiet)

    def __enter__(self) -> StepPrinter:
        if self._live is not None:
            for handler in logging.getLogger("distill_cli").handlers:  # warnings stand above the panel
                if getattr(handler, "stream", None) is self.console.file:
                    handler.setStream(FileProxy(self.console, self.console.file))
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str) -> None:
        """What is happening now; shown on a terminal only."""
        self.screen.stage = name

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    def example(self, parts: Sequence[tuple[str, bool]]) -> None:
        """One sequence as it is trained on: what has no loss is grey, what has is green and stands in >>> <<<."""
        shown = Text("the first sequence; the loss is on what stands in >>> <<<\n", style="dim")
        for text, is_trained in parts:
            shown.append(f">>>{text}<<<" if is_trained else text, style="green" if is_trained else "dim")
        self.console.print(shown)

    def step(self, step: int, metrics: Mapping[str, float], *, at: float | None = None) -> None:
        """Show a step that is done, `at` seconds since 1970 (now). A terminal keeps the lines of validations.

        Step 0, before training, is shown if the student was validated.
        """
        if step == 0 and "val/accuracy" not in metrics:
            return
        self.screen.add(step, metrics, at=at)
        validates, due = "val/accuracy" in metrics, step % self._every == 0 or step == self._num_steps
        if validates or (due and self._live is None):
            self.say(step_line(step, self._num_steps, metrics))

    def expect(self, num_steps: int) -> None:
        """How many steps there will be, where that was not known at first."""
        self._num_steps = self.screen.num_steps = num_steps


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """Return `step 12/80 loss=0.0312 ...`: the metrics that are shown there, in the order of `metrics`."""
    found = [(find(key), value) for key, value in metrics.items() if value is not None]
    shown = [metric.step_line.format(value) for metric, value in found if metric and metric.step_line]
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
