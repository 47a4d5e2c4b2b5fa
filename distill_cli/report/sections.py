"""What a report says in words and tables, and the small datasets of its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill_cli.metrics import STAGES, find, gap_closed
from distill_cli.report.comparison import two_key_grid
from distill_cli.report.figures import field
from distill_cli.report.history import History
from distill_cli.report.read import COMPARED

MAX_BARS = 120
"""Of the stacked seconds; neighbouring steps share a bar where there are more."""
PAGE_COLUMNS = [metric for metric in COMPARED if "page" in metric.compared_in]


@dataclass(frozen=True)
class Summary:
    """One run in a sentence, and the facts beside it."""

    headline: str
    facts: list[tuple[str, str]]


def summary(history: History) -> Summary:
    return Summary(headline=_headline(history), facts=_facts(history))


def _headline(history: History) -> str:
    outcome, state = history.outcome, history.result.state
    before = (outcome.get("before") or {}).get("accuracy", history.first("val/accuracy"))
    teacher = (outcome.get("teacher") or {}).get("accuracy", history.first("val/teacher_accuracy"))
    after = history.last("val/accuracy")
    if after is None:
        kl = history.last("train/kl_forward")
        measured = f"KL forward stands at {kl:.3g} nats a token" if kl is not None else "nothing was measured yet"
        said = f"{measured} after {history.result.step} steps"
    else:
        said = f"{after:.1%} of the held-out problems right"
        if before is not None:
            said = f"From {before:.1%} to {after:.1%} of the held-out problems right"
        said += f" in {history.result.step} steps"
        if teacher is not None:
            said += f"; the teacher has {teacher:.1%}"
        gap = gap_closed(before, after, teacher)
        if gap is not None:
            said += f": {gap:.0%} of the gap closed"
    return said[0].upper() + said[1:] + ("." if state == "finished" else f". The run is {state}.")


def _facts(history: History) -> list[tuple[str, str]]:
    config = history.config
    seconds = history.outcome.get("seconds")
    rows = {
        "student": config.get("model.student.path"),
        "teacher": config.get("model.teacher.path"),
        "loss": f"{config.get('loss.kl_type')}, top-{config.get('loss.topk')}, tail {config.get('loss.tail')}",
        "time": f"{history.result.step} steps in {_duration(seconds)}" if seconds else None,
        "folder": str(history.folder),
        "command": history.command,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0) + [f"{rest} s"] * (hours == 0)
    return " ".join(parts)


def level_rows(histories: Sequence[History]) -> list[dict[str, Any]]:
    """The horizontal lines of the accuracy figure: those that all runs share. `at` is where no curve crosses them."""
    rows = []
    for key, label, at in (
        ("val/accuracy", "student before training", "bottom"),
        ("val/teacher_accuracy", "teacher", "top"),
    ):
        values = {history.first(key) for history in histories} - {None}
        if len(values) == 1:
            rows.append({"label": label, "at": at, "value": values.pop()})
    return rows


def stages_of(history: History) -> list[str]:
    """Return the stages that take a thousandth of the time or more, in the order of a step."""
    totals = {stage: sum(row.get(f"time/{stage}_s") or 0.0 for row in history.steps) for stage in STAGES}
    return [stage for stage, seconds in totals.items() if seconds > 0 and seconds >= 1e-3 * sum(totals.values())]


def stage_rows(history: History) -> list[dict[str, Any]]:
    """The `stages` dataset: mean seconds of each stage in each bar."""
    steps, stages = history.steps, stages_of(history)
    width = -(-len(steps) // MAX_BARS) or 1
    rows = []
    for begin in range(0, len(steps), width):
        bar = steps[begin : begin + width]
        first, last = int(bar[0]["step"]), int(bar[-1]["step"])
        label = str(first) if first == last else f"{first} to {last}"
        seconds = {stage: sum(row.get(f"time/{stage}_s") or 0.0 for row in bar) / len(bar) for stage in stages}
        total, low = sum(seconds.values()) or 1.0, 0.0
        for stage in stages:
            high = low + seconds[stage]
            rows.append(
                {
                    "from": first - 0.5, "to": last + 0.5, "label": label,
                    "stage": stage, "low": round(low, 5), "high": round(high, 5), "seconds": round(seconds[stage], 5),
                    "share": round(seconds[stage] / total, 4),
                }
            )  # fmt: skip
            low = high
    return rows


def time_note(history: History) -> dict[str, str] | None:
    """Which stage takes most of a run's steps, and what to turn. The first step, which warms up, is left out."""
    steps = history.steps[1:] or history.steps
    totals = {stage: sum(row.get(f"time/{stage}_s") or 0.0 for row in steps) for stage in stages_of(history)}
    if not totals or not sum(totals.values()):
        return None
    stage = max(totals, key=totals.__getitem__)
    return {
        "stage": stage,
        "share": f"{totals[stage] / sum(totals.values()):.0%}",
        "seconds": f"{totals[stage] / len(steps):.3g}",
        "keys": STAGES[stage].remedy,
    }


def memory_note(history: History) -> str:
    """What the predicted bar leaves open."""
    if not history.memory.get("parts"):
        return ""
    note = f"Predicted at most {history.memory['peak'] / 2**30:.3g} GiB at once"
    asleep = history.memory.get("asleep")
    return f"{note}: {' and '.join(asleep)} sleep while the student trains." if asleep else f"{note}."


def memory_rows(history: History) -> list[dict[str, Any]]:
    """The `memory` dataset."""
    parts = history.memory.get("parts", {})
    return [
        {"part": part, "place": place, "gib": round(size / 2**30, 6)}
        for place, (part, size) in enumerate(parts.items())
        if size
    ]


def grid_rows(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Return the `grid` dataset: the last value of each compared metric, if the runs are a grid of two keys."""
    if two_key_grid([history.result for history in histories]) is None:
        return []
    rows = []
    for history in histories:
        row, column = history.result.settings.values()
        final = history.result.final
        values = {field(key): value for key, value in final.items()}
        told = {f"told_{field(key)}": find(key).shown(value) for key, value in final.items()}
        rows.append({"run": history.name, "row": row, "column": column, **values, **told})
    return rows


def comparison(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Return a row for each run: how it ended and what came of it; the best of the finished ones is marked."""
    rows = []
    for history in histories:
        final, state = history.result.final, history.result.state
        accuracy = final.get("val/accuracy")
        gap = gap_closed(history.first("val/accuracy"), accuracy, history.first("val/teacher_accuracy"))
        cells = {metric.label: metric.shown(final.get(metric.name)) for metric in PAGE_COLUMNS}
        rows.append(
            {
                "name": history.name, "folder": history.result.name, "state": state, "step": history.result.step,
                "cells": cells, "gap": "" if gap is None else f"{gap:.0%}",
                "rank": accuracy if state == "finished" else None,
            }
        )  # fmt: skip
    best = max((row["rank"] for row in rows if row["rank"] is not None), default=None)
    return [row | {"is_best": best is not None and row["rank"] == best} for row in rows]


def differing_settings(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all configs, with each run's; a run's own name and place are left out."""
    keys = dict.fromkeys(key for history in histories for key in history.config)
    rows = [(key, [_yaml(history.config.get(key, "")) for history in histories]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and not key.startswith("run.")]


def config_table(history: History) -> list[tuple[str, str, bool]]:
    """Every key with its value, and whether it was typed."""
    command = history.command
    return [(key, _yaml(value), f" {key}=" in command) for key, value in history.config.items()]


def _yaml(value: Any) -> str:
    """As it is typed."""
    return value.replace("\n", "↵") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
