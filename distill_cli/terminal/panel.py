"""What a terminal shows of a run in progress: one panel that is drawn again, from the metrics' rows as they come."""

from __future__ import annotations

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
"""The time left is told from the pace of so many steps."""
LABEL_WIDTH = 9


@dataclass
class Screen:
    """A run as far as it has come. Rich draws it."""

    title: str
    num_steps: int | None
    """None where it is not known yet."""
    stage: str = "starting"
    step: int = 0
    rows: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)
    """When each step ended (seconds since 1970), and its metrics."""
    began: float = field(default_factory=time.time)
    last_seen: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""
    first_seen: dict[str, float] = field(default_factory=dict)

    def add(self, step: int, metrics: Mapping[str, float], *, at: float | None = None) -> None:
        """A step that is done."""
        self.step = step
        self.rows.append((time.time() if at is None else at, dict(metrics)))
        known = {key: value for key, value in metrics.items() if value is not None}
        self.first_seen = known | self.first_seen
        self.last_seen |= known

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", width=LABEL_WIDTH)
        table.add_column()
        for name, told in self.lines():
            table.add_row(name, Text(told))
        return Panel(Group(self._bar(), table), title=Text(self.title), title_align="left", expand=False)

    def _bar(self) -> RenderableType:
        of = f"/{self.num_steps}" if self.num_steps else ""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=LABEL_WIDTH)
        bar = ProgressBar(total=self.num_steps or None, completed=self.step, width=SPARK_STEPS)
        grid.add_row(Text(f"step {self.step}{of}", style="bold"), bar, Text(self.clock()))
        grid.columns[0].width = max(LABEL_WIDTH, len(f"step {self.step}{of}"))
        return grid

    def clock(self) -> str:
        left = self.seconds_left()
        return f"{_clock(time.time() - self.began)} so far" + (
            f", about {_clock(left)} left" if left is not None else ""
        )

    def seconds_left(self) -> float | None:
        """From the pace of the last steps, validations and checkpoints included."""
        times = [at for at, _ in self.rows[-PACE_STEPS - 1 :]]
        if not self.num_steps or len(times) < 2:
            return None
        return (self.num_steps - self.step) * (times[-1] - times[0]) / (len(times) - 1)

    def lines(self) -> list[tuple[str, str]]:
        """Return label and text of each line: the stage, then the metrics that have a value."""
        rows: dict[str, list[str]] = {"now": [self.stage]}
        for metric in METRICS:
            if metric.panel is not None and metric.name in self.last_seen:
                label, text = metric.panel
                value, first = self.last_seen[metric.name], self.first_seen[metric.name]
                part = text.format(value=value, first=first, spark=self.spark(metric.name))
                rows.setdefault(label, []).append(part)
        return [(label, ", ".join(parts)) for label, parts in rows.items()]

    def spark(self, key: str) -> str:
        """The metric's last steps as a row of bars."""
        values = [row[key] for _, row in self.rows[-SPARK_STEPS:] if row.get(key) is not None]
        return sparks(values)


def sparks(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    steps = len(SPARKS) - 1
    return "".join(SPARKS[round(steps * (value - low) / (high - low)) if high > low else 0] for value in values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
