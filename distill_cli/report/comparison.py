"""The comparison of runs in a terminal: a matrix for a grid of two keys, else one row a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from distill_cli.metrics import Metric
from distill_cli.report.read import COMPARED, RunResult

UNFINISHED = "*"
WIDTH = 200
"""Columns where the output is no terminal."""


def print_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """Final KL, loss and accuracy over whatever was swept, and the best of each."""
    console.print(comparison(results), width=None if console.is_terminal else WIDTH, crop=False)
    for line in [*best_lines(results), *state_lines(results)]:
        console.print(escape(line), soft_wrap=True)


def comparison(results: Sequence[RunResult]) -> RenderableType:
    grid = two_key_grid(results)
    if grid is None:
        return rows_table(results)
    return Group(*(matrix(metric, grid) for metric in _measured(results)))


def two_key_grid(results: Sequence[RunResult]) -> dict[tuple[str, str], RunResult] | None:
    """The runs by their two settings, where there are two, each with several values, and every pair is there once."""
    keys = [tuple(result.settings) for result in results]
    if not keys or len(keys[0]) != 2 or len(set(keys)) > 1:
        return None
    grid = {tuple(result.settings.values()): result for result in results}
    rows, columns = _values(grid, 0), _values(grid, 1)
    whole = len(results) == len(grid) == len(rows) * len(columns)
    return grid if whole and min(len(rows), len(columns)) > 1 else None


def matrix(metric: Metric, grid: dict[tuple[str, str], RunResult]) -> Table:
    """Return a metric over a grid: the first key down, the second across."""
    results = list(grid.values())
    row_key, column_key = results[0].settings
    table = _new_table(title=f"{metric.label} ({metric.name})")
    table.add_column(escape(f"{row_key} \\ {column_key}"))
    for column in _values(grid, 1):
        table.add_column(escape(column), justify="right")
    for row in _values(grid, 0):
        table.add_row(escape(row), *(_cell(grid[row, column], metric, results) for column in _values(grid, 1)))
    return table


def rows_table(results: Sequence[RunResult]) -> Table:
    table = _new_table()
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    metrics = _measured(results)
    for column in (*(keys or ["run"]), "state", "step"):
        table.add_column(escape(column))
    for metric in metrics:
        table.add_column(metric.label, justify="right")
    for result in results:
        told = [result.settings.get(key, "") for key in keys] or [result.name]
        cells = [_cell(result, metric, results) for metric in metrics]
        table.add_row(*map(escape, told), result.state, str(result.step), *cells)
    return table


def best_lines(results: Sequence[RunResult]) -> Iterable[str]:
    if len(results) < 2:
        return
    for metric in _measured(results):
        best = _best(results, metric)
        if best is not None:
            told = " ".join(f"{key}={value}" for key, value in best.settings.items()) or best.name
            yield f"best {metric.label:<11} {metric.shown(best.final[metric.name])}  {told}"


def state_lines(results: Sequence[RunResult]) -> Iterable[str]:
    others = [result for result in results if result.state != "finished"]
    if others:
        more = f" and {len(others) - 20} more" if len(others) > 20 else ""
        listed = ", ".join(f"{result.name} ({result.state})" for result in others[:20])
        yield f"{UNFINISHED} not finished: {listed}{more}"


def _best(results: Sequence[RunResult], metric: Metric) -> RunResult | None:
    """Of the finished runs."""
    finished = [result for result in results if result.state == "finished" and metric.name in result.final]
    choose = max if metric.better == "higher" else min
    return choose(finished, key=lambda result: result.final[metric.name], default=None)


def _cell(result: RunResult, metric: Metric, results: Sequence[RunResult]) -> str:
    if metric.name not in result.final:
        return result.state if result.state != "finished" else ""
    number = metric.shown(result.final[metric.name]) + ("" if result.state == "finished" else UNFINISHED)
    return f"[bold]{number}[/bold]" if result is _best(results, metric) else number


def _measured(results: Sequence[RunResult]) -> list[Metric]:
    """The metrics of the terminal's comparison that some run has."""
    shown = [metric for metric in COMPARED if "terminal" in metric.compared_in]
    return [metric for metric in shown if any(metric.name in result.final for result in results)]


def _values(grid: dict[tuple[str, str], RunResult], axis: int) -> list[str]:
    return list(dict.fromkeys(key[axis] for key in grid))


def _new_table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
