"""TensorBoard: event files in the run's folder. `tensorboard --logdir runs` shows those of all runs."""

from __future__ import annotations

import re
import shlex
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet

from distill_cli.config.execution_schema import TensorboardConfig
from distill_cli.config.schema import Config
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.machine.findings import Finding, missing_extra, optional_package
from distill_cli.track.base import Tracker

if TYPE_CHECKING:
    from distill_cli.track.event_files import EventFiles

COLUMNS = ["prompt_index", "prompt", "response", "reward"]


class TensorboardTracker(Tracker):
    name = "tensorboard"
    label = "TensorBoard"
    files = ("config.yaml", "rollouts/step_*.parquet")

    def __init__(self, settings: TensorboardConfig, config: Config, run: RunDir) -> None:
        self._settings, self._run, self._folder = settings, run, run.path / "tensorboard"
        self.place = str(self._folder)
        self.page = shlex.join(["tensorboard", "--logdir", config.run.root])

    def identity(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return when the folder was made: if it was removed, nothing of the run is there."""
        made = known.get("made") if self._folder.is_dir() else None
        return {"made": made or round(time.time(), 3)}

    def open(self, identity: dict[str, Any], *, running: bool) -> None:
        if (swept := self._swept()) and not self._events.files():
            self._events.begin_session(swept)

    @cached_property
    def _events(self) -> EventFiles:
        from distill_cli.track.event_files import EventFiles

        return EventFiles(self._folder)

    def logged(self) -> set[tuple[str, int]]:
        return self._events.read_scalars()

    def log(self, rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            if values := {key: value for key, value in row.items() if key not in ("step", "time")}:
                self._events.write_scalars(values, step=int(row["step"]), at=row["time"])

    def artifact(self, file: Path, name: str) -> None:
        """Show the config, and the first recorded answers of a step; the file of another step replaces no answer."""
        at = file.stat().st_mtime
        if name == "config.yaml":
            self._events.write_text("config", quoted(file.read_text()), step=0, at=at)
        elif step := re.search(r"step_(\d+)\.parquet$", name):
            for tag, markdown in answers(file, number=self._settings.samples):
                self._events.write_text(tag, markdown, step=int(step[1]), at=at)

    def close(self, status: str) -> None:
        if self._swept() and self._events.is_open:
            self._events.end_session(is_success=status == "finished")
        self._events.close()

    def _swept(self) -> dict[str, str]:
        """Return the keys and values that distinguish this run of a sweep; none for a single run."""
        elements = [one for one in SweepDir(self._run.path.parent).elements() if one.folder == self._run.path.name]
        words = (word.lstrip("+").partition("=") for element in elements for word in element.overrides)
        return {key: value for key, _, value in words}

    @classmethod
    def problems(cls, settings: TensorboardConfig) -> Iterator[str]:
        yield from missing_extra("tensorboard")

    @classmethod
    def doctor(cls) -> list[Finding]:
        return [optional_package("tensorboard")]


TRACKER = TensorboardTracker


def answers(file: Path, *, number: int) -> Iterator[tuple[str, str]]:
    """Yield a tag and Markdown for each of the first recorded answers of a step; a prompt keeps its tag."""
    for row in pyarrow.parquet.read_table(file, columns=COLUMNS).slice(0, number).to_pylist():
        reward = "" if row["reward"] is None else f" (reward {row['reward']:g})"
        parts = ("**prompt**", quoted(row["prompt"]), f"**answer**{reward}", quoted(row["response"]))
        yield f"answers/{row['prompt_index']}", "\n\n".join(parts)


def quoted(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return textwrap.indent(text, "    ", lambda _: True)
