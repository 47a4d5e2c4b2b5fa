"""The report's figures as Vega-Lite specifications, whose data the page hands in by name.

The datasets: `steps` has a row a step and run (`run`, `step`, and every metric under the name that `field` makes of
it), `levels` the horizontal lines of the accuracy figure, `stages` seconds by stage, `memory` bytes by part,
`positions` the KL by a token's position, `grid` a sweep's outcome by its two keys. Colours, fonts and backgrounds are
the page's: they follow light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_cli.metrics import Figure, Metric

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""Names the language; nothing is fetched from there."""
ZOOMED: Spec = {"zero": False, "nice": True}


def field(metric: str) -> str:
    """A metric's name as a field: Vega would take `.`, `[` and `]` for paths into objects."""
    return metric.replace("/", "_")


def chart(id: str, title: str, spec: Spec, *, wide: bool = False) -> dict[str, Any]:
    """A figure's place in the page, and its specification."""
    return {"id": id, "title": title, "wide": wide, "spec": {"$schema": SCHEMA, **spec}}


def lines(figure: Figure, metrics: Sequence[Metric], *, runs: Sequence[str] = ()) -> Spec:
    """Return metrics over steps. One run has a line for each metric; several, named by `runs`, have a colour each, and
    then dashes tell the metrics apart."""
    fields = {field(metric.name): metric.series or metric.label for metric in metrics}
    percent, unit = metrics[0].is_share, metrics[0].unit
    fold = [
        {"fold": list(fields), "as": ["field", "value"]},
        {"filter": "isValid(datum.value)" + (" && datum.value > 0" if figure.log else "")},
        {"calculate": _lookup(fields), "as": "series"},
    ]
    y = {
        "field": "value",
        "type": "quantitative",
        "title": unit,
        "scale": {"type": "log"} if figure.log else ({"domain": [0, 1]} if figure.from_0_to_1 else ZOOMED),
        "axis": {"format": "~%" if percent else ".4~g", "tickCount": 5},
    }
    encoding: Spec = {"x": step_axis(), "y": y}
    told_apart = {"field": "series", "type": "nominal", "title": None, "scale": {"domain": list(fields.values())}}
    if runs:
        encoding["color"] = run_colour(runs)
        if len(fields) > 1:
            encoding["strokeDash"] = told_apart
    elif len(fields) > 1:
        encoding["color"] = told_apart
    return {
        "data": {"name": "steps"},
        "transform": fold,
        "height": figure.height,
        "encoding": encoding,
        "layer": [_line(runs), *_hover(".1%" if percent else ".4~g", runs=runs, several=len(fields) > 1)],
    }


def accuracy(figure: Figure, metrics: Sequence[Metric], *, runs: Sequence[str] = ()) -> Spec:
    """Return held-out and sampled accuracy, with the student's start and the teacher as horizontal lines."""
    spec = lines(figure, metrics, runs=runs)
    held_out = {"filter": "datum.field == 'val_accuracy'"}
    points: Spec = {"mark": {"type": "point", "filled": True, "size": 36}, "transform": [held_out]}
    if runs:
        points["encoding"] = {"opacity": CHOSEN}
    level = {"field": "value", "type": "quantitative"}
    rule = {
        "data": {"name": "levels"},
        "mark": {"type": "rule", "strokeDash": [5, 4], "size": 1.2, "color": {"expr": "muted"}},
        "encoding": {"y": level, "x": None, "color": None, "strokeDash": None},
    }
    text = {
        "data": {"name": "levels"},
        "mark": {
            "type": "text", "align": {"expr": "datum.at == 'top' ? 'left' : 'right'"},
            "x": {"expr": "datum.at == 'top' ? 6 : width - 4"}, "color": {"expr": "muted"},
            "dy": {"expr": "datum.at == 'top' && datum.value < 0.93 ? -8 : 9"},
        },
        "encoding": {"y": level, "text": {"field": "label"}, "x": None, "color": None, "strokeDash": None},
    }  # fmt: skip
    behind = {"stroke": {"expr": "paper"}, "strokeWidth": 4, "strokeJoin": "round", "color": {"expr": "paper"}}
    halo = {**text, "mark": {**text["mark"], **behind}}  # curves may run through the words
    # What is shared by the layers would ask the horizontal lines for a step.
    shared = spec.pop("encoding")
    transform = spec.pop("transform")
    own = [
        {"data": {"name": "steps"}, "transform": transform, "encoding": shared, "layer": [*spec["layer"], points]},
    ]
    return {"height": figure.height, "layer": [*own, rule, halo, text]}


def stacked_time(stages: Sequence[str], *, height: int = 230) -> Spec:
    """Seconds of a step by stage, stacked."""
    return {
        "data": {"name": "stages"},
        "height": height,
        "mark": {"type": "rect", "stroke": None},
        "encoding": {
            "x": {**step_axis(), "field": "from", "scale": {"nice": False, "zero": False}},
            "x2": {"field": "to"},
            "y": {"field": "low", "type": "quantitative", "title": "seconds a step", "axis": {"tickCount": 5}},
            "y2": {"field": "high"},
            "color": {
                "field": "stage",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(stages)},
                "legend": {"symbolType": "square", "columns": 12},
            },
            "tooltip": [
                {"field": "label", "title": "step"},
                {"field": "stage"},
                {"field": "seconds", "format": ".3f"},
                {"field": "share", "format": ".0%", "title": "of the step"},
            ],
        },
    }


def memory_parts(*, height: int = 74) -> Spec:
    """The predicted peak of a rank, by part, as one bar."""
    return {
        "data": {"name": "memory"},
        "height": height,
        "mark": "bar",
        "encoding": {
            "x": {"field": "gib", "type": "quantitative", "title": "GiB of a rank, predicted", "stack": True},
            "color": {
                "field": "part",
                "type": "nominal",
                "title": None,
                "sort": None,
                "legend": {"symbolType": "square"},
            },
            "order": {"field": "place"},
            "tooltip": [{"field": "part"}, {"field": "gib", "title": "GiB", "format": ".3f"}],
        },
    }


def by_position(*, runs: Sequence[str] = (), height: int = 230) -> Spec:
    """Mean KL of the recorded answers' tokens by their position, before and after."""
    encoding: Spec = {
        "x": {"field": "position", "type": "quantitative", "title": "position in the answer"},
        "y": {"field": "kl", "type": "quantitative", "title": "KL forward, nats", "axis": {"tickCount": 5}},
        "color": {"field": "when", "title": None, "sort": None},
        "tooltip": [
            *([{"field": "run"}] if runs else []),
            {"field": "when", "title": "student"},
            {"field": "label", "title": "tokens"},
            {"field": "kl", "title": "mean KL", "format": ".4f"},
            {"field": "count", "title": "answers"},
        ],
    }
    if runs:
        encoding |= {"color": run_colour(runs), "opacity": CHOSEN}
        encoding["strokeDash"] = {"field": "when", "title": None, "sort": None}
    marks = [{"mark": {"type": "line", "clip": True}}, {"mark": {"type": "point", "filled": True, "size": 24}}]
    return {"data": {"name": "positions"}, "height": height, "encoding": encoding, "layer": marks}


def heat_map(row_key: str, column_key: str, metric: Metric, *, num_rows: int) -> Spec:
    """Return a metric over a sweep's two keys."""
    measured, higher_is_better = field(metric.name), metric.better == "higher"
    axes = {
        "x": {"field": "column", "type": "ordinal", "title": column_key, "sort": None, "axis": {"labelAngle": 0}},
        "y": {"field": "row", "type": "ordinal", "title": row_key, "sort": None},
    }
    colour = {
        "field": measured,
        "type": "quantitative",
        "title": None,
        "legend": None,
        "scale": {"scheme": "viridis", "reverse": not higher_is_better, "zero": False},
    }
    # The scale's bright end is the better one: dark words on it, light words on the dark end.
    share = f"(datum.{measured} - datum.low) / max(datum.high - datum.low, 1e-12)"
    bright = f"{share} {'>' if higher_is_better else '<'} 0.5"
    ends = [{"op": op, "field": measured, "as": name} for op, name in (("min", "low"), ("max", "high"))]
    return {
        "data": {"name": "grid"},
        "transform": [{"filter": f"isValid(datum.{measured})"}, {"joinaggregate": ends}],
        "height": 46 * num_rows,
        "encoding": axes,
        "layer": [
            {
                "mark": {"type": "rect", "cornerRadius": 3},
                "encoding": {
                    "color": colour,
                    "tooltip": [{"field": "run"}, {"field": f"told_{measured}", "title": metric.label}],
                },
            },
            {
                "mark": {"type": "text", "fontSize": 13, "fontWeight": 600},
                "encoding": {
                    "text": {"field": f"told_{measured}", "type": "nominal"},  # the browser rounds otherwise
                    "color": {"condition": {"test": bright, "value": "#111"}, "value": "#fff"},
                },
            },
        ],
    }


def step_axis() -> Spec:
    return {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1, "format": "~s"}}


def run_colour(runs: Sequence[str]) -> Spec:
    """One colour a run, the same in every figure; the page has the legend."""
    return {"field": "run", "type": "nominal", "scale": {"domain": list(runs)}, "legend": None}


CHOSEN: Spec = {"condition": {"test": "chosen == '' || datum.run == chosen", "value": 1}, "value": 0.1}
"""Opacity: the page's legend singles a run out by the parameter."""


def _line(runs: Sequence[str]) -> Spec:
    line: Spec = {"mark": {"type": "line", "clip": True}}
    if runs:
        line["encoding"] = {"opacity": CHOSEN}
    return line


def _hover(form: str, *, runs: Sequence[str] = (), several: bool) -> list[Spec]:
    """A dot on the point that is nearest to the pointer, and what stands there."""
    nearest = {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True}
    told = [{"field": "run"}] if runs else []
    told += [{"field": "series", "title": "what"}] if several else []
    return [
        {
            "mark": {"type": "point", "filled": True, "size": 60},
            "params": [{"name": "near", "select": nearest}],
            "encoding": {
                "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                "tooltip": [*told, {"field": "step"}, {"field": "value", "format": form}],
            },
        }
    ]


def _lookup(labels: dict[str, str]) -> str:
    """A Vega expression: the label of a field. Names are this package's own."""
    pairs = ", ".join(f"{name}: '{label}'" for name, label in labels.items())
    return "({" + pairs + "})[datum.field]"
