"""Write the page's sentences and tables, and the datasets of its figures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill_cli.config.loss_schema import describe_loss
from distill_cli.metrics import STAGES, Metric
from distill_cli.report.comparison import two_key_grid
from distill_cli.report.figures import field
from distill_cli.report.pools import NEAR, Pool, mean_of, rank
from distill_cli.report.read import COMPARED, History, Row, differing_keys, groups
from distill_cli.terminal.step_printer import clock

MAX_BARS = 120
"""Bars of the stacked seconds; neighbouring steps share a bar if there are more."""
PAGE_COLUMNS = [metric for metric in COMPARED if "page" in metric.compared_in]
HELD_OUT = next(metric for metric in PAGE_COLUMNS if metric.name == "val/accuracy")
GAP = Metric("gap_closed", "share of the way from the student's start to the teacher", number_format=".0%")


def headline(history: History) -> str:
    """Return the result of a run in one sentence."""
    before, after, teacher = history.accuracies
    state, step = history.result.state, history.result.step
    end = "." if state == "finished" else f". The run is {state}."
    if after is None:
        kl = history.last("train/kl_forward")
        measured = "Nothing was measured yet" if kl is None else f"KL forward is {kl:.3g} nats per token"
        return f"{measured} after {step} steps{end}"
    start = "" if before is None else f"From {before:.1%} to "
    reference = "" if teacher is None else f"; the teacher has {teacher:.1%}"
    gap = "" if history.gap_closed is None else f": {history.gap_closed:.0%} of the gap closed"
    return f"{start}{after:.1%} of the held-out problems right in {step} steps{reference}{gap}{end}"


def facts(history: History) -> list[tuple[str, str]]:
    """Return what identifies a run: models, loss, duration, folder and command."""
    config, seconds = history.config, history.outcome.seconds if history.outcome else 0
    rows = {
        "student": config.get("model.student.path"),
        "teacher": teachers(config),
        "loss": describe_loss(config),
        "time": f"{history.result.step} steps in {clock(seconds)}" if seconds else None,
        "folder": history.result.folder,
        "command": history.command,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def teachers(config: Mapping[str, Any]) -> str | None:
    """Return the path of the teacher, or names and paths of several."""
    only, begin = config.get("model.teacher.path"), "model.teachers."
    names = dict.fromkeys(key.split(".")[2] for key in config if key.startswith(begin))
    return ", ".join(f"{name}: {config.get(f'{begin}{name}.path', only)}" for name in names) or only


def level_rows(histories: Sequence[History]) -> list[Row]:
    """Return the `levels` dataset: horizontal lines that all runs share. `at` is where no curve crosses the label."""
    levels = (("val/accuracy", "student before training", "bottom"), ("val/teacher_accuracy", "teacher", "top"))
    values = [{history.first(key) for history in histories} - {None} for key, _, _ in levels]
    return [
        {"label": label, "at": at, "value": value.pop()}
        for (_, label, at), value in zip(levels, values, strict=True)
        if len(value) == 1
    ]


def stages_of(history: History) -> list[str]:
    """Return the stages that take at least a thousandth of the time, in the order of a step."""
    totals = _mean_seconds(history.steps, list(STAGES))
    return [stage for stage, seconds in totals.items() if seconds > 0 and seconds >= 1e-3 * sum(totals.values())]


def _mean_seconds(rows: Sequence[Row], stages: Sequence[str]) -> dict[str, float]:
    return {stage: sum(row.get(f"time/{stage}_s") or 0.0 for row in rows) / max(len(rows), 1) for stage in stages}


def stage_rows(history: History) -> Iterator[Row]:
    """Yield the `stages` dataset: mean seconds of each stage in each bar."""
    stages = stages_of(history)
    for bar in groups(history.steps, MAX_BARS):
        first, last = int(bar[0]["step"]), int(bar[-1]["step"])
        label = str(first) if first == last else f"{first} to {last}"
        means, low = _mean_seconds(bar, stages), 0.0
        total = sum(means.values()) or 1.0
        for stage, seconds in means.items():
            yield {
                "from": first - 0.5, "to": last + 0.5, "label": label, "stage": stage, "low": round(low, 5),
                "high": round(low + seconds, 5), "seconds": round(seconds, 5), "share": round(seconds / total, 4),
            }  # fmt: skip
            low += seconds


def time_note(history: History) -> dict[str, str] | None:
    """Return the slowest stage and the keys that change it. Leaves out the first step, which warms up."""
    means = _mean_seconds(history.steps[1:] or history.steps, stages_of(history))
    if not sum(means.values()):
        return None
    stage = max(means, key=means.__getitem__)
    share = f"{means[stage] / sum(means.values()):.0%}"
    return {"stage": stage, "share": share, "seconds": f"{means[stage]:.3g}", "keys": STAGES[stage].remedy}


def memory_note(history: History) -> str:
    """Return what the bar of predicted memory does not show: its peak, and which engines sleep."""
    if not history.memory.get("parts"):
        return ""
    note, asleep = f"Predicted peak: {history.memory['peak'] / 2**30:.3g} GiB", history.memory.get("asleep")
    return f"{note}; asleep while the student trains: {', '.join(asleep)}." if asleep else f"{note}."


def memory_rows(history: History) -> list[Row]:
    """Return the `memory` dataset."""
    parts = enumerate(history.memory.get("parts", {}).items())
    return [{"part": part, "place": place, "gib": round(size / 2**30, 6)} for place, (part, size) in parts if size]


def grid_rows(among: Sequence[Pool]) -> Iterator[Row]:
    """Yield the `grid` dataset: the final value of each compared metric, if the runs are a grid of two keys."""
    if (grid := two_key_grid(among)) is None:
        return
    for (row, column), pool in grid.items():
        cells: Row = {"run": pool.name, "row": row, "column": column}
        for metric in COMPARED:
            if (mean := pool.mean(metric.name)) is not None:
                cells |= {field(metric.name): mean.value, f"shown_{field(metric.name)}": mean.shown(metric)}
        yield cells


def comparison(histories: Sequence[History], among: Sequence[Pool]) -> list[Row]:
    """Return a row for each pool of runs: its state and final values; the best accuracy of the finished is marked."""
    history_of = {history.result.folder: history for history in histories}
    ranking, rows = rank(among, HELD_OUT), []
    top = ranking.best.mean(HELD_OUT.name) if ranking.best else None
    for pool in among:
        runs = [history_of[result.folder] for result in pool.counted]
        means = {metric: pool.mean(metric.name) for metric in PAGE_COLUMNS}
        cells = {metric.label: mean.shown(metric) if mean else "" for metric, mean in means.items()}
        closed = [run.gap_closed for run in runs if run.gap_closed is not None]
        rows.append(
            {
                "name": pool.name if len(pool.results) > 1 else history_of[pool.results[0].folder].name,
                "pool": pool,
                "cells": cells | ({HELD_OUT.label: f"{cells[HELD_OUT.label]} {NEAR}"} if pool in ranking.near else {}),
                "gap": mean_of(closed).shown(GAP) if closed else "",
                "is_best": pool.is_finished and top is not None and means[HELD_OUT] == top,
                "is_near_best": pool in ranking.near,
            }
        )
    return rows


def differing_settings(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ between the configs, with each run's value."""
    keys = differing_keys([history.config for history in histories])
    return [(key, [_yaml(history.config.get(key, "")) for history in histories]) for key in keys]


def config_table(history: History) -> list[tuple[str, str, bool]]:
    """Return every key with its value, and whether it was typed."""
    return [(key, _yaml(value), f" {key}=" in history.command) for key, value in history.config.items()]


def _yaml(value: Any) -> str:
    """Return a value as a user types it."""
    return value.replace("\n", "↵") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
