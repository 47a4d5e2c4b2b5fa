"""Print a run's progress: one greppable line per step, or a live panel with the time left.

The main rank's standard output is the user's; everything else that a rank prints goes to its log file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from rich.console import Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill_cli.metrics import METRICS, find
from distill_cli.terminal.console import Console

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 40
PACE_STEPS = 20
"""Steps whose pace predicts the time left."""
LABEL_WIDTH = 9


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


@dataclass
class Screen:
    """A run as far as it has come, as a renderable of rich."""

    title: str
    num_steps: int | None
    """None if it is not known yet."""
    stage: str = "starting"
    step: int = 0
    rows: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)
    """When each step ended (seconds since 1970), and its metrics."""
    began: float = field(default_factory=time.time)
    first_seen: dict[str, float] = field(default_factory=dict)
    """The first value of each metric."""
    last_seen: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""

    def add(self, step: int, metrics: Mapping[str, float], *, at: float | None = None) -> None:
        """Add a finished step; `at` is when it ended (now)."""
        known = {key: value for key, value in metrics.items() if value is not None}
        self.step = step
        self.rows.append((time.time() if at is None else at, known))
        self.first_seen = known | self.first_seen
        self.last_seen |= known

    def __rich__(self) -> RenderableType:
        step = f"step {self.step}" + (f"/{self.num_steps}" if self.num_steps else "")
        progress = Table.grid(padding=(0, 2))
        progress.add_column(width=max(LABEL_WIDTH, len(step)))
        bar = ProgressBar(total=self.num_steps or None, completed=self.step, width=SPARK_STEPS)
        left = self.seconds_left()
        times = f"{clock(time.time() - self.began)} so far" + ("" if left is None else f", about {clock(left)} left")
        progress.add_row(Text(step, style="bold"), bar, Text(times))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", width=LABEL_WIDTH)
        for label, text in self.lines():
            table.add_row(label, Text(text))
        return Panel(Group(progress, table), title=Text(self.title), title_align="left", expand=False)

    def seconds_left(self) -> float | None:
        """Return the time left at the pace of the last steps, with their validations and checkpoints."""
        times = [at for at, _ in self.rows[-PACE_STEPS - 1 :]]
        return seconds_left(times, step=self.step, num_steps=self.num_steps)

    def lines(self) -> list[tuple[str, str]]:
        """Return label and text of each line: the stage, then the metrics that have a value."""
        rows = {"now": [self.stage]}
        for metric in (one for declared in METRICS if declared.panel for one in declared.among(self.last_seen)):
            assert metric.panel
            label, text = metric.panel
            value, first = self.last_seen[metric.name], self.first_seen[metric.name]
            spark = sparks([row[metric.name] for _, row in self.rows[-SPARK_STEPS:] if metric.name in row])
            rows.setdefault(label, []).append(text.format(value=value, first=first, spark=spark, name=metric.series))
        return [(label, ", ".join(parts)) for label, parts in rows.items()]


def seconds_left(times: Sequence[float], *, step: int, num_steps: int | None) -> float | None:
    """Return the time left after a step; `times` are when the last steps ended. None if there is no pace yet."""
    if not num_steps or len(times) < 2:
        return None
    return (num_steps - step) * (times[-1] - times[0]) / (len(times) - 1)


def clock(seconds: float) -> str:
    """Return hours, if there are any, minutes and seconds: `26:02:03`, `1:20`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparks(values: Sequence[float]) -> str:
    """Return values as a row of bars between their extremes; empty for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    top, span = len(SPARKS) - 1, (high - low) or 1
    return "".join(SPARKS[round(top * (value - low) / span)] for value in values)


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
