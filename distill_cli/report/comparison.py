"""The comparison of runs in a terminal: a matrix for each metric if two keys form a grid, else a row for each run."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from distill_cli.metrics import Metric
from distill_cli.report.read import COMPARED, RunResult

UNFINISHED = "*"
WIDTH = 200
"""Columns if the output is no terminal."""
MAX_LISTED = 20
"""Names of unfinished runs below the table."""
Grid = dict[tuple[str, str], RunResult]


def print_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """Print final KL, loss and accuracy of each run, the best of each metric, and which runs have not finished."""
    recorded = {name for result in results for name in result.final}
    metrics = [metric for metric in COMPARED if "terminal" in metric.compared_in and metric.name in recorded]
    grid = two_key_grid(results)
    shown: RenderableType = Group(*(_matrix(metric, grid) for metric in metrics)) if grid else _rows(results, metrics)
    console.print(shown, width=None if console.is_terminal else WIDTH, crop=False)
    lines = [_best_line(results, metric) for metric in metrics if len(results) > 1]
    if names := [f"{result.name} ({result.state})" for result in results if result.state != "finished"]:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        lines.append(f"{UNFINISHED} not finished: {', '.join(names[:MAX_LISTED])}{more}")
    for line in filter(None, lines):
        console.print(escape(line), soft_wrap=True)


def two_key_grid(results: Sequence[RunResult]) -> Grid | None:
    """Return the runs by the values of their two settings; None unless all pairs of several values occur once each."""
    keys = {tuple(result.settings) for result in results}
    if len(keys) != 1 or len(keys.pop()) != 2:
        return None
    grid = {(row, column): result for result in results for row, column in [result.settings.values()]}
    rows, columns = {row for row, _ in grid}, {column for _, column in grid}
    is_whole = len(results) == len(grid) == len(rows) * len(columns)
    return grid if is_whole and min(len(rows), len(columns)) > 1 else None


def _matrix(metric: Metric, grid: Grid) -> Table:
    """Return a metric over a grid: the first key down, the second across."""
    results, columns = list(grid.values()), list(dict.fromkeys(column for _, column in grid))
    table = _new_table(" \\ ".join(results[0].settings), *columns, title=f"{metric.label} ({metric.name})")
    for row in dict.fromkeys(row for row, _ in grid):
        table.add_row(escape(row), *(_cell(grid[row, column], metric, results) for column in columns))
    return table


def _rows(results: Sequence[RunResult], metrics: Sequence[Metric]) -> Table:
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    left = [*(keys or ["run"]), "state", "step"]
    table = _new_table(*left, *(metric.label for metric in metrics), left=len(left))
    for result in results:
        settings = [result.settings.get(key, "") for key in keys] or [result.name]
        cells = [_cell(result, metric, results) for metric in metrics]
        table.add_row(*map(escape, settings), result.state, str(result.step), *cells)
    return table


def _best_line(results: Sequence[RunResult], metric: Metric) -> str:
    if (best := _best(results, metric)) is None:
        return ""
    settings = " ".join(f"{key}={value}" for key, value in best.settings.items()) or best.name
    return f"best {metric.label:<11} {metric.shown(best.final[metric.name])}  {settings}"


def _best(results: Sequence[RunResult], metric: Metric) -> RunResult | None:
    """Return the finished run with the best value."""
    finished = [result for result in results if result.state == "finished" and metric.name in result.final]
    choose = max if metric.better == "higher" else min
    return choose(finished, key=lambda result: result.final[metric.name], default=None)


def _cell(result: RunResult, metric: Metric, results: Sequence[RunResult]) -> str:
    is_finished = result.state == "finished"
    if metric.name not in result.final:
        return "" if is_finished else result.state
    number = metric.shown(result.final[metric.name]) + ("" if is_finished else UNFINISHED)
    return f"[bold]{number}[/bold]" if result is _best(results, metric) else number


def _new_table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """Return an empty table whose first `left` columns are left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if place < left else "right")
    return table
