"""Answers on a terminal as they are written: one, or two in columns. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distill_cli.chat.answers import Answer
from distill_cli.terminal.console import Console
from distill_cli.terminal.printable import printable

COLUMNS_FROM = 100
"""Width of a terminal from which two answers stand side by side."""
GAP, FRAME_LINES = 3, 4
"""Between the columns; lines of the screen that are kept free while answers are written."""


class Columns:
    """Two answers side by side. While they are written their last lines are shown, then the whole of them."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        self._console, self._answers = console, answers
        self._live = Live(
            self, console=console, refresh_per_second=8, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Columns:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._console.print(self.table(None))

    def __rich__(self) -> RenderableType:
        return self.table(max(1, self._console.height - FRAME_LINES))

    def table(self, most_lines: int | None) -> Table:
        """Return both answers, each with its name and remark; their last `most_lines` lines if it is not None."""
        width = (self._console.width - GAP) // 2
        table = Table.grid(padding=(0, GAP, 0, 0))
        for _ in self._answers:
            table.add_column(width=width)
        table.add_row(
            *(Text(answer.speaker.name, style="bold", overflow="ellipsis", no_wrap=True) for answer in self._answers)
        )
        table.add_row(*(wrapped(answer.text, self._console, width, most_lines) for answer in self._answers))
        if any(answer.remark for answer in self._answers):
            table.add_row(*(Text(answer.remark, style="dim") for answer in self._answers))
        return table


def wrapped(text: str, console: Console, width: int, most_lines: int | None) -> Text:
    """Return a model's text as lines of `width`, the last `most_lines` of them; all for None."""
    lines = Text(printable(text)).wrap(console, width)
    return Text("\n").join(lines if most_lines is None else lines[-most_lines:])


def fits_columns(console: Console) -> bool:
    """Whether two answers stand side by side."""
    return console.is_terminal and console.width >= COLUMNS_FROM
