"""The report's figures as Vega-Lite specifications. The page provides their data by name, and colours, fonts and
backgrounds, which follow light and dark.

The datasets: `steps` has a row for each step and run (`run`, `step`, and every metric under the name that `field`
returns), `levels` the horizontal lines of the accuracy figure, `stages` seconds by stage, `memory` bytes by part,
`positions` the KL by a token's position, `grid` a sweep's results by its two keys.
"""

import re
from collections.abc import Sequence
from typing import Any

from distill_cli.metrics import Figure, Metric

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""The name of the language; nothing is fetched from there."""
CHOSEN: Spec = {"condition": {"test": "chosen == '' || datum.run == chosen", "value": 1}, "value": 0.1}
"""Opacity: `chosen` is the run that the page's legend highlights."""


def field(metric: str) -> str:
    """Return a metric's name as a field: Vega takes `.`, `[` and `]` for paths into objects."""
    return re.sub(r"[/.\[\]]", "_", metric)


def chart(section: str, id: str, title: str, spec: Spec, *, wide: bool = False) -> Spec:
    """Return a figure with its place in the page."""
    return {"section": section, "id": id, "title": title, "wide": wide, "spec": {"$schema": SCHEMA, **spec}}


def lines(figure: Figure, metrics: Sequence[Metric], *, runs: Sequence[str] = ()) -> Spec:
    """Return metrics over steps. One run has a colour for each metric; `runs` have a colour each, and dashes for
    metrics."""
    fields = {field(metric.name): metric.series or metric.label for metric in metrics}
    is_share, several = metrics[0].is_share, len(fields) > 1
    labels = ", ".join(f"{name!r}: {label!r}" for name, label in fields.items())  # without quotes or backslashes
    linear = {"domain": [0, 1]} if figure.from_0_to_1 else {"zero": False, "nice": True}
    axis = {"format": "~%" if is_share else ".4~g", "tickCount": 5}
    y = _axis("value", metrics[0].unit, scale={"type": "log"} if figure.log else linear, axis=axis)
    by_series = _groups("series", scale={"domain": list(fields.values())})
    columns = {"run": "run"} if runs else {}
    columns |= {"series": "metric"} if several else {}
    nearest = {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True}
    if_near = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    tooltip = _tooltip(columns | {"step": "step", "value": "value"}, value=".1%" if is_share else ".4~g")
    point = _marks("point", {"opacity": if_near, "tooltip": tooltip}, filled=True, size=60)
    point["params"] = [{"name": "near", "select": nearest}]
    transform = [
        {"fold": list(fields), "as": ["field", "value"]},
        {"filter": "isValid(datum.value)" + (" && datum.value > 0" if figure.log else "")},
        {"calculate": f"({{{labels}}})[datum.field]", "as": "series"},
    ]
    encoding: Spec = {"x": _steps(), "y": y}
    if runs:
        encoding["color"] = _by_run(runs)
    if several:
        encoding["strokeDash" if runs else "color"] = by_series
    layer = [_marks("line", {"opacity": CHOSEN} if runs else {}, clip=True), point]
    return _spec("steps", figure.height, encoding, transform=transform, layer=layer)


def accuracy(figure: Figure, metrics: Sequence[Metric], *, runs: Sequence[str] = ()) -> Spec:
    """Return held-out and sampled accuracy, with the student's start and the teacher as horizontal lines."""
    spec = lines(figure, metrics, runs=runs)
    points = _marks("point", {"opacity": CHOSEN} if runs else {}, filled=True, size=36)
    points["transform"] = [{"filter": "datum.field == 'val_accuracy'"}]
    at_level = {"y": {"field": "value", "type": "quantitative"}, "x": None, "color": None, "strokeDash": None}
    rule = {"type": "rule", "strokeDash": [5, 4], "size": 1.2, "color": {"expr": "muted"}}
    text = {
        "type": "text",
        "align": {"expr": "datum.at == 'top' ? 'left' : 'right'"},
        "x": {"expr": "datum.at == 'top' ? 6 : width - 4"},
        "color": {"expr": "muted"},
        "dy": {"expr": "datum.at == 'top' && datum.value < 0.93 ? -8 : 9"},
    }
    paper, label = {"expr": "paper"}, {"text": {"field": "label"}}
    halo = text | {"stroke": paper, "strokeWidth": 4, "strokeJoin": "round", "color": paper}  # clears curves behind it
    levels = [
        {"data": {"name": "levels"}, "mark": mark, "encoding": at_level | shown}
        for mark, shown in ((rule, {}), (halo, label), (text, label))
    ]
    spec["layer"].append(points)
    # The curves are a layer of their own: an encoding shared with the horizontal lines would need a step from them.
    return {"height": spec.pop("height"), "layer": [spec, *levels]}


def stacked_time(stages: Sequence[str]) -> Spec:
    """Return the seconds of a step by stage, stacked."""
    titles = {"label": "step", "stage": "stage", "seconds": "seconds", "share": "of the step"}
    legend = {"symbolType": "square", "columns": 12}
    encoding = {
        "x": {**_steps(), "field": "from", "scale": {"nice": False, "zero": False}},
        "x2": {"field": "to"},
        "y": _axis("low", "seconds per step", axis={"tickCount": 5}),
        "y2": {"field": "high"},
        "color": _groups("stage", scale={"domain": list(stages)}, legend=legend),
        "tooltip": _tooltip(titles, seconds=".3f", share=".0%"),
    }
    return _spec("stages", 230, encoding, mark={"type": "rect", "stroke": None})


def memory_parts() -> Spec:
    """Return the predicted peak of a rank, by part, as one bar."""
    encoding = {
        "x": _axis("gib", "GiB of a rank, predicted", stack=True),
        "color": _groups("part", sort=None, legend={"symbolType": "square"}),
        "order": {"field": "place"},
        "tooltip": _tooltip({"part": "part", "gib": "GiB"}, gib=".3f"),
    }
    return _spec("memory", 74, encoding, mark="bar")


def by_position(*, runs: Sequence[str] = ()) -> Spec:
    """Return the mean KL of the recorded answers' tokens by position, before and after training."""
    titles = {"when": "student", "label": "tokens", "kl": "mean KL", "count": "answers"}
    by_step = _groups("when", sort=None)
    encoding = {
        "x": _axis("position", "position in the answer"),
        "y": _axis("kl", "KL forward, nats", axis={"tickCount": 5}),
        "tooltip": _tooltip(({"run": "run"} if runs else {}) | titles, kl=".4f"),
        **({"color": _by_run(runs), "opacity": CHOSEN, "strokeDash": by_step} if runs else {"color": by_step}),
    }
    layer = [_marks("line", {}, clip=True), _marks("point", {}, filled=True, size=24)]
    return _spec("positions", 230, encoding, layer=layer)


def heat_map(row_key: str, column_key: str, metric: Metric, *, num_rows: int) -> Spec:
    """Return a metric over a sweep's two keys. The bright end of the scale is the better one."""
    value, higher_is_better = field(metric.name), metric.better == "higher"
    share = f"(datum.{value} - datum.low) / max(datum.high - datum.low, 1e-12)"
    is_bright = f"{share} {'>' if higher_is_better else '<'} 0.5"
    ends = [{"op": op, "field": value, "as": name} for op, name in (("min", "low"), ("max", "high"))]
    scale = {"scheme": "viridis", "reverse": not higher_is_better, "zero": False}
    cells = {
        "color": _axis(value, None, legend=None, scale=scale),
        "tooltip": _tooltip({"run": "run", f"shown_{value}": metric.label}),
    }
    numbers = {
        "text": {"field": f"shown_{value}", "type": "nominal"},  # the browser would round the metric itself
        "color": {"condition": {"test": is_bright, "value": "#111"}, "value": "#fff"},
    }
    encoding = {
        "x": {"field": "column", "type": "ordinal", "title": column_key, "sort": None, "axis": {"labelAngle": 0}},
        "y": {"field": "row", "type": "ordinal", "title": row_key, "sort": None},
    }
    layer = [_marks("rect", cells, cornerRadius=3), _marks("text", numbers, fontSize=13, fontWeight=600)]
    transform = [{"filter": f"isValid(datum.{value})"}, {"joinaggregate": ends}]
    return _spec("grid", 46 * num_rows, encoding, layer=layer, transform=transform)


def _spec(data: str, height: int, encoding: Spec, **parts: Any) -> Spec:
    return {"data": {"name": data}, "height": height, "encoding": encoding, **parts}


def _marks(kind: str, encoding: Spec, **looks: Any) -> Spec:
    """Return a layer of marks; `encoding` adds to what the layers share."""
    return {"mark": {"type": kind, **looks}, "encoding": encoding}


def _axis(name: str, title: str | None, **looks: Any) -> Spec:
    return {"field": name, "type": "quantitative", "title": title, **looks}


def _steps() -> Spec:
    return _axis("step", "step", axis={"tickMinStep": 1, "format": "~s"})


def _groups(name: str, **looks: Any) -> Spec:
    return {"field": name, "type": "nominal", "title": None, **looks}


def _by_run(runs: Sequence[str]) -> Spec:
    """Return one colour for each run, the same in every figure; the page has the legend."""
    return {"field": "run", "type": "nominal", "scale": {"domain": list(runs)}, "legend": None}


def _tooltip(titles: dict[str, str], **formats: str) -> list[Spec]:
    """Return the lines of a tooltip: each field's title, and its number format if it has one."""
    formatted = {name: {"format": form} for name, form in formats.items()}
    return [{"field": name, "title": title, **formatted.get(name, {})} for name, title in titles.items()]
