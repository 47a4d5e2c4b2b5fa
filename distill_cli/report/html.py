"""Write the page about one or several runs: one HTML file without network or server.

Figures are drawn by Vega-Lite's own script, which is part of the page. The data that the page's script reads (of the
figures, and the recorded answers) is gzipped JSON in base64, which no text from a model or a dataset can end early; the
script inserts texts as text nodes. Texts in the HTML itself go through Jinja's escaping.
"""

import base64
import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.metrics import ACCURACY, METRICS, SECTIONS
from distill_cli.report import figures, samples, sections
from distill_cli.report.comparison import seed_notes
from distill_cli.report.pools import Pool, is_pooled, pools, rank
from distill_cli.report.read import COMPARED, History, Row, RunResult, read_histories, thinned
from distill_cli.report.verdict import verdict

FILE = "report.html"
"""Name of the page in its run's or sweep's folder, or, of several, in the current one."""
FOLDER = Path(__file__).parent
"""Where page.html, page.css and the scripts are."""
PLACES = ("grid", *SECTIONS, "samples")
MAX_ROWS = 1000
"""Steps of one run in a page; neighbouring steps are averaged if there are more."""
MAX_ROWS_IN_ALL = 4000
"""Steps of all runs in a page."""


def write_report(results: Sequence[RunResult], path: Path) -> Path:
    """Write the page about these runs to `path`, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    page = render(read_histories(results))
    try:
        with replacing(path) as temporary:
            temporary.write_text(page)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another with --out") from error
    return path


@dataclass(frozen=True)
class Page:
    """What the page about some runs shows."""

    words: Mapping[str, Any]
    """The variables of page.html: sentences, tables, and the figures of each section."""
    data: Mapping[str, Any]
    """What the page's script draws figures from: their specifications and datasets, and the names of the runs."""


def render(histories: Sequence[History]) -> str:
    """Return the page. A single run has facts, time and memory; several have a comparison and a legend."""
    recorded = samples.read_samples(histories)
    page = make_page(histories, recorded)
    return templates(FOLDER).get_template("page.html").render(
        page.words, data=packed(page.data), samples=packed(recorded.shown), css=Markup(part("page.css")),
        script=Markup(part("dom.js") + part("page.js")), vega=Markup(vega()),
    )  # fmt: skip


def make_page(histories: Sequence[History], recorded: samples.Samples) -> Page:
    """Return the page about one run, or several compared; `recorded` are their answers."""
    names, first, many = [history.name for history in histories], histories[0], len(histories) > 1
    among = pools([history.result for history in histories])
    data: dict[str, Any] = {"datasets": datasets(histories, among, recorded.positions), "runs": names}
    data["charts"] = list(make_charts(histories, among, data["datasets"]))
    if many:
        own: dict[str, Any] = {
            "title": f"{len(histories)} runs",
            "comparison": sections.comparison(histories, among),
            "columns": [metric.label for metric in sections.PAGE_COLUMNS],
            "has_seeds": is_pooled(among),
            "seed_notes": list(seed_notes(among, [rank(among, sections.HELD_OUT)])),
            "differing": sections.differing_settings(histories),
        }
    else:
        own = {"title": first.name, "headline": sections.headline(first), "facts": sections.facts(first)}
        own["verdict"] = verdict(first.rows, first.config)
        own |= {"memory_note": sections.memory_note(first), "time_note": sections.time_note(first)}
        own["config"] = sections.config_table(first)
    charts = {section: [one for one in data["charts"] if one["section"] == section] for section in PLACES}
    shared = {"names": names, "many": many, "charts": charts, "has_samples": bool(recorded.shown)}
    return Page(own | shared, data)


def templates(*folders: Path) -> jinja2.Environment:
    """Return the templates in these folders: texts are escaped, and a variable that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), trim_blocks=True, lstrip_blocks=True, autoescape=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def packed(value: Any) -> str:
    """Return a value as gzipped JSON in base64, which no text in it can end early."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def datasets(histories: Sequence[History], among: Sequence[Pool], positions: list[Row]) -> dict[str, list[Row]]:
    """Return the data of the figures by the names that `figures` uses."""
    most = min(MAX_ROWS, max(MAX_ROWS_IN_ALL // len(histories), 50))
    single = len(histories) == 1
    return {
        "steps": [
            {"run": history.name} | {figures.field(key): value for key, value in row.items() if value is not None}
            for history in histories
            for row in thinned(history.rows, most)
        ],
        "levels": sections.level_rows(histories),
        "stages": list(sections.stage_rows(histories[0])) if single else [],
        "memory": sections.memory_rows(histories[0]) if single else [],
        "positions": positions,
        "grid": list(sections.grid_rows(among)),
    }


def make_charts(
    histories: Sequence[History], among: Sequence[Pool], data: Mapping[str, list[Row]]
) -> Iterator[figures.Spec]:
    """Yield the page's figures, without those that have no data."""
    runs = [history.name for history in histories] if len(histories) > 1 else []
    if rows := data["grid"]:
        row_key, column_key = among[0].settings
        for metric in COMPARED:
            if "heat map" in metric.compared_in and any(figures.field(metric.name) in row for row in rows):
                title = f"{metric.label[0].upper()}{metric.label[1:]}, {metric.unit}"
                spec = figures.heat_map(row_key, column_key, metric, num_rows=len({row["row"] for row in rows}))
                yield figures.chart("grid", f"grid-{figures.field(metric.name)}", title, spec)
    if data["stages"]:
        spec = figures.stacked_time(sections.stages_of(histories[0]))
        yield figures.chart("time", "time", "Seconds per step, by stage", spec, wide=True)
    if data["memory"]:
        yield figures.chart("memory", "memory", "Predicted memory of a rank, by part", figures.memory_parts())
    recorded = dict.fromkeys(key for history in histories for row in history.rows for key in row)
    has = [one for metric in METRICS if metric.figure for one in metric.among(recorded)]
    for figure in dict.fromkeys(one.figure for one in has):
        assert figure
        draw = figures.accuracy if figure == ACCURACY else figures.lines
        shown = [one for one in METRICS if one.figure == figure and not one.is_family]
        spec = draw(figure, shown or [one for one in has if one.figure == figure], runs=runs)
        yield figures.chart(figure.section, figure.id, figure.title, spec, wide=figure.wide)
    if data["positions"]:
        spec = figures.by_position(runs=runs)
        yield figures.chart("samples", "positions", "KL by position in the answer", spec, wide=True)


def part(name: str) -> str:
    """Return one of the files that the page is made of."""
    return (FOLDER / name).read_text()


@cache
def vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which defines `vegaEmbed`.

    Bundling takes seconds: the script is kept in the user's cache folder, under the bundler's version.

    Raises:
        DistillError: the bundler is not installed.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        cached = cache_home / "distill" / f"vega-{metadata.version('vl-convert-python')}.js"
    except metadata.PackageNotFoundError as error:
        raise DistillError("vl-convert-python is not installed, which has the figures' script; install it") from error
    if cached.is_file():
        return cached.read_text()
    import vl_convert

    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default
    assert "</script" not in script.lower(), "the bundle would end its own script element"
    with suppress(OSError):  # if the home is read-only, the next page bundles again
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached, unique=True) as temporary:
            temporary.write_text(script)
    return script
