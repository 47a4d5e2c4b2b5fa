"""The comparison of runs in a terminal: a matrix for each metric if two keys form a grid, else a row for each run.

Runs that differ only in their seed are one entry: `pools`.
"""

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from distill_cli.metrics import Metric
from distill_cli.report.pools import NEAR, Pool, Ranking, is_pooled, pools, rank
from distill_cli.report.read import COMPARED, RunResult

UNFINISHED = "*"
WIDTH = 200
"""Columns if the output is no terminal."""
MAX_LISTED = 20
"""Names of unfinished runs below the table."""
Grid = dict[tuple[str, str], Pool]


def print_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """Print final KL, loss and accuracy of each run, the best of each metric, and which runs have not finished."""
    recorded = {name for result in results for name in result.final}
    metrics = [metric for metric in COMPARED if "terminal" in metric.compared_in and metric.name in recorded]
    among = pools(results)
    grid, ranked = two_key_grid(among), [(metric, rank(among, metric)) for metric in metrics]
    shown: RenderableType = Group(*(_matrix(grid, *one) for one in ranked)) if grid else _rows(among, ranked)
    wide = console if console.is_terminal else type(console)(file=console.file, width=WIDTH, highlight=False)
    wide.print(shown)
    lines = [_best_line(*one) for one in ranked if len(among) > 1]
    lines += seed_notes(among, [ranking for _, ranking in ranked])
    if names := [f"{result.name} ({result.state})" for result in results if result.state != "finished"]:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        lines.append(f"{UNFINISHED} not finished: {', '.join(names[:MAX_LISTED])}{more}")
    for line in filter(None, lines):
        console.print(escape(line), soft_wrap=True)


def two_key_grid(among: Sequence[Pool]) -> Grid | None:
    """Return the runs by the values of their two settings; None unless all pairs of several values occur once each."""
    keys = {tuple(pool.settings) for pool in among}
    if len(keys) != 1 or len(keys.pop()) != 2:
        return None
    grid = {(row, column): pool for pool in among for row, column in [pool.settings.values()]}
    rows, columns = {row for row, _ in grid}, {column for _, column in grid}
    is_whole = len(among) == len(grid) == len(rows) * len(columns)
    return grid if is_whole and min(len(rows), len(columns)) > 1 else None


def seed_notes(among: Sequence[Pool], rankings: Sequence[Ranking]) -> Iterator[str]:
    """Yield what a reader of means over seeds must know: the meaning of ± and ≈, and which seeds make no difference."""
    if any(len(pool.counted) > 1 and not pool.is_repeated for pool in among):
        yield "±: half of the mean's 95% interval over seeds (Student's t)"
    if any(ranking.near for ranking in rankings):
        yield f"{NEAR} within the interval of the best: the two intervals overlap"
    if repeated := [pool for pool in among if pool.is_repeated]:
        name, number = repeated[0].name, len(repeated[0].counted)
        yield f"no interval for {name}: {number} runs have the same values, so nothing in them depends on the seed"


def _matrix(grid: Grid, metric: Metric, ranking: Ranking) -> Table:
    """Return a metric over a grid: the first key down, the second across."""
    keys, columns = next(iter(grid.values())).settings, list(dict.fromkeys(column for _, column in grid))
    table = _new_table(" \\ ".join(keys), *columns, title=f"{metric.label} ({metric.name})")
    for row in dict.fromkeys(row for row, _ in grid):
        table.add_row(escape(row), *(_cell(grid[row, column], metric, ranking) for column in columns))
    return table


def _rows(among: Sequence[Pool], ranked: Sequence[tuple[Metric, Ranking]]) -> Table:
    keys = list(dict.fromkeys(key for pool in among for key in pool.settings))
    has_use = {"state": not all(pool.is_finished for pool in among), "seeds": is_pooled(among), "step": True}
    more = [name for name, is_shown in has_use.items() if is_shown]
    left = [*(keys or ["run"]), *more]
    table = _new_table(*left, *(metric.label for metric, _ in ranked), left=len(left))
    for pool in among:
        settings = [pool.settings.get(key, "") for key in keys] or [pool.name]
        facts = {"state": pool.state, "seeds": str(len(pool.counted)), "step": pool.step}
        cells = [_cell(pool, *one) for one in ranked]
        table.add_row(*map(escape, settings), *(facts[name] for name in more), *cells)
    return table


def _best_line(metric: Metric, ranking: Ranking) -> str:
    if (best := ranking.best) is None:
        return ""
    mean = best.mean(metric.name)
    assert mean is not None, "it was ranked by it"
    settings = " ".join(f"{key}={value}" for key, value in best.settings.items()) or best.name
    others = f"; {len(ranking.near)} more within its interval ({NEAR})" if ranking.near else ""
    return f"best {metric.label:<11} {mean.shown(metric)}  {settings}{others}"


def _cell(pool: Pool, metric: Metric, ranking: Ranking) -> str:
    mean = pool.mean(metric.name)
    if mean is None:
        return "" if pool.is_finished else pool.state
    number = mean.shown(metric) + ("" if pool.is_finished else UNFINISHED)
    if pool in ranking.near:
        number += f" {NEAR}"
    return f"[bold]{number}[/bold]" if pool is ranking.best else number


def _new_table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """Return an empty table whose first `left` columns are left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if place < left else "right", overflow="fold")
    return table
