"""Record a stage's figures, and format them. No torch at import time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_cli.folders.run_dir import write_json


class StageFailed(Exception):
    """The stage found something wrong; the message is one line."""


class Stage:
    """A running stage. Everything it records is written to disk immediately."""

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
        """Record a figure and its target. A rehearsal ignores targets unless `wrong_if_missed`.

        Args:
            wrong_if_missed: missing the target is a defect: the stage continues, and fails at its end.
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
        """Record a table, such as a profile."""
        self._found.setdefault("tables", {})[name] = rows
        self._write()

    def facts(self, **facts: str) -> None:
        self._found["facts"] = facts
        self._write()

    def fail(self, error: str) -> None:
        """Record why the stage failed; only the first reason is kept."""
        self._found.setdefault("error", error)
        self._write()

    def _write(self) -> None:
        write_json(self._report, self._found)


def show(value: float) -> str:
    """Format with three significant digits, or as a whole number from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def target(figure: dict[str, Any]) -> str:
    """Format a figure's target; empty if it has none."""
    parts = [f"at least {show(figure['at_least'])}"] if figure["at_least"] is not None else []
    parts += [f"at most {show(figure['at_most'])}"] if figure["at_most"] is not None else []
    return ", ".join(parts)


def figure_line(figure: dict[str, Any]) -> str:
    mark = {True: "met   ", False: "MISSED", None: "      "}[figure["is_met"]]
    value = f"{show(figure['value'])} {figure['unit']}".strip()
    return f"{mark} {figure['name']:<58} {value:>16}  {target(figure)}".rstrip()
