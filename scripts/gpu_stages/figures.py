"""What a stage records, and how it is shown. No torch at import time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill_cli.rundir import write_json


class StageFailed(Exception):
    """What was measured is wrong, in one line."""


class Stage:
    """One stage at work: everything recorded is on disk at once."""

    def __init__(self, report: Path, scratch: Path, *, rehearse: bool) -> None:
        self.scratch, self.rehearse = scratch, rehearse
        """`scratch` is shared by the stages of a run."""
        self._report = report
        self._found: dict[str, Any] = {"figures": []}

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def record(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        wrong_if_missed: bool = False,
    ) -> None:
        """Note a figure and what is asked of it; a rehearsal asks only what must hold anywhere.

        Args:
            wrong_if_missed: a number that is not met is a defect, not a matter of speed: the stage goes on and fails.
        """
        if self.rehearse and not wrong_if_missed:
            at_least = at_most = None
        is_met = None
        if at_least is not None or at_most is not None:
            is_met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        self._found["figures"].append(
            {"name": name, "value": value, "unit": unit, "at_least": at_least, "at_most": at_most, "is_met": is_met}
        )
        if wrong_if_missed and is_met is False:
            self.fail(f"{name} is {show(value)} {unit}".strip())
        self._write()

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep rows that belong together, such as a profile."""
        self._found.setdefault("tables", {})[name] = rows
        self._write()

    def facts(self, **facts: str) -> None:
        self._found["facts"] = facts
        self._write()

    def fail(self, error: str) -> None:
        """Note why the stage failed; the first reason stays."""
        self._found.setdefault("error", error)
        self._write()

    def _write(self) -> None:
        write_json(self._report, self._found)


def show(value: float) -> str:
    """Three digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def asked(figure: dict[str, Any]) -> str:
    """What was asked of a figure; empty where nothing was."""
    parts = [f"at least {show(figure['at_least'])}"] if figure["at_least"] is not None else []
    parts += [f"at most {show(figure['at_most'])}"] if figure["at_most"] is not None else []
    return ", ".join(parts)


def figure_line(figure: dict[str, Any]) -> str:
    mark = {True: "met   ", False: "MISSED", None: "      "}[figure["is_met"]]
    value = f"{show(figure['value'])} {figure['unit']}".strip()
    return f"{mark} {figure['name']:<58} {value:>16}  {asked(figure)}".rstrip()


def last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])
