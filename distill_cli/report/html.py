"""A run, or several, as one HTML file that needs nothing else: no network, no server.

Figures are Vega-Lite's, drawn by its own script, which is part of the page. What the page's script reads (data of the
figures, the recorded answers) is gzipped JSON in base64, which no text from a model or a dataset can end early; the
script writes texts as texts. What stands in the HTML itself goes through Jinja's escaping.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distill_cli.errors import ConfigError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.metrics import ACCURACY, METRICS, SECTIONS
from distill_cli.report import figures
from distill_cli.report.history import MAX_ROWS, MAX_ROWS_IN_ALL, History, read_histories, thinned
from distill_cli.report.read import COMPARED, RunResult
from distill_cli.report.samples import page_samples, position_rows, read_answers
from distill_cli.report.sections import (
    PAGE_COLUMNS,
    comparison,
    config_table,
    differing_settings,
    grid_rows,
    level_rows,
    memory_note,
    memory_rows,
    stage_rows,
    stages_of,
    summary,
    time_note,
)

FILE = "report.html"


def report_file(paths: Sequence[Path]) -> Path:
    """Where a page belongs: in the folder that it is about, or in the current one where it is about several."""
    return paths[0] / FILE if len(paths) == 1 else Path(FILE)


def write_report(results: Sequence[RunResult], path: Path) -> Path:
    """Writes the page about these runs to `path`, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    page = render(read_histories(results))
    try:
        with replacing(path) as temporary:
            temporary.write_text(page)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another with --out") from error
    return path


def render(histories: Sequence[History]) -> str:
    answers, charts = read_answers(histories), make_charts(histories)
    data = {
        "datasets": datasets(histories, position_rows(histories, answers)),
        "charts": [chart for group in charts.values() for chart in group],
        "runs": [history.name for history in histories],
        "samples": page_samples(answers) if answers else None,
    }
    many = len(histories) > 1
    return _template().render(
        title=f"{len(histories)} runs" if many else histories[0].name,
        histories=histories,
        many=many,
        summary=[summary(history) for history in histories],
        charts={group: {chart["id"]: chart for chart in of_group} for group, of_group in charts.items()},
        memory_note="" if many else memory_note(histories[0]),
        time_note=None if many else time_note(histories[0]),
        comparison=comparison(histories) if many else None,
        columns=[metric.label for metric in PAGE_COLUMNS],
        differing=differing_settings(histories) if many else None,
        config=None if many else config_table(histories[0]),
        has_samples=bool(answers),
        data=packed(data),
        css=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        vega=Markup(_vega()),
    )


def packed(data: Any) -> str:
    """Gzipped JSON in base64."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def datasets(histories: Sequence[History], positions: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By the names that `figures` gives them."""
    most = min(MAX_ROWS, max(MAX_ROWS_IN_ALL // len(histories), 50))
    first = histories[0]
    return {
        "steps": [
            {"run": history.name} | {figures.field(key): value for key, value in row.items() if value is not None}
            for history in histories
            for row in thinned(history.rows, most)
        ],
        "levels": level_rows(histories),
        "stages": stage_rows(first) if len(histories) == 1 else [],
        "memory": memory_rows(first) if len(histories) == 1 else [],
        "positions": positions,
        "grid": grid_rows(histories),
    }


def make_charts(histories: Sequence[History]) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of each section of the page; those without data are left out."""
    many, first = len(histories) > 1, histories[0]
    runs = [history.name for history in histories] if many else []
    has = {key for history in histories for row in history.rows for key, value in row.items() if value is not None}
    charts: dict[str, list[dict[str, Any]]] = {section: [] for section in (*SECTIONS, "samples")}
    if not many and stages_of(first):
        stacked = figures.stacked_time(stages_of(first))
        charts["time"].append(figures.chart("time", "Seconds of a step, by stage", stacked, wide=True))
    if not many and memory_rows(first):
        charts["memory"].append(figures.chart("memory", "Predicted memory of a rank, by part", figures.memory_parts()))
    for figure in dict.fromkeys(metric.figure for metric in METRICS if metric.figure and metric.name in has):
        metrics = [metric for metric in METRICS if metric.figure == figure]
        draw = figures.accuracy if figure == ACCURACY else figures.lines
        spec = draw(figure, metrics, runs=runs)
        charts[figure.section].append(figures.chart(figure.id, figure.title, spec, wide=figure.wide))
    if any(history.sample_files for history in histories):
        positions = figures.by_position(runs=runs)
        charts["samples"].append(figures.chart("positions", "KL by position in the answer", positions, wide=True))
    return {"grid": grid_charts(histories), **charts}


def grid_charts(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Return a heat map of each metric that has one, if the runs are a grid of two keys."""
    rows = grid_rows(histories)
    keys, num_rows = tuple(histories[0].result.settings), len({row["row"] for row in rows})
    shown = [metric for metric in COMPARED if "heat map" in metric.compared_in]
    return [
        figures.chart(
            f"grid-{figures.field(metric.name)}",
            f"{metric.label[0].upper()}{metric.label[1:]}, {metric.unit}",
            figures.heat_map(*keys, metric, num_rows=num_rows),
        )
        for metric in shown
        if any(figures.field(metric.name) in row for row in rows)
    ]


def _template() -> jinja2.Template:
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict).from_string(_part("page.html"))


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which defines `vegaEmbed`.

    Bundling takes seconds: the result is kept among the user's caches, under the bundler's version.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache_home / "distill" / f"vega-{metadata.version('vl-convert-python')}.js"
    if kept.is_file():
        return kept.read_text()
    import vl_convert

    script = vl_convert.javascript_bundle()
    assert "</script" not in script.lower(), "the bundle would end its own script element"
    with suppress(OSError):  # a home that cannot be written costs the seconds again, nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept, unique=True) as temporary:
            temporary.write_text(script)
    return script
