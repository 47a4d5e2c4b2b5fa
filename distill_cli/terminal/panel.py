"""The live panel of a run in progress, drawn from its rows of metrics as they come."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill_cli.metrics import METRICS

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 40
PACE_STEPS = 20
"""Steps whose pace predicts the time left."""
LABEL_WIDTH = 9


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
        if not self.num_steps or len(times) < 2:
            return None
        return (self.num_steps - self.step) * (times[-1] - times[0]) / (len(times) - 1)

    def lines(self) -> list[tuple[str, str]]:
        """Return label and text of each line: the stage, then the metrics that have a value."""
        rows = {"now": [self.stage]}
        for metric in METRICS:
            if metric.panel and metric.name in self.last_seen:
                label, text = metric.panel
                value, first = self.last_seen[metric.name], self.first_seen[metric.name]
                spark = sparks([row[metric.name] for _, row in self.rows[-SPARK_STEPS:] if metric.name in row])
                rows.setdefault(label, []).append(text.format(value=value, first=first, spark=spark))
        return [(label, ", ".join(parts)) for label, parts in rows.items()]


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
