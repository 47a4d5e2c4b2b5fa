"""The protocol of a tracker, and the trackers of a run.

A tracker (MLflow, W&B, TensorBoard) shows runs on its own pages. It holds no truth: it follows a run's folder
(metrics.jsonl, system.jsonl, files), and can follow again from nothing. Its methods run in a thread of the process that
launched the ranks (`shipper`), one thread per tracker, which catches whatever they raise and calls again later. So no
tracker can stop or slow training, or another tracker.

A new one is `track/<name>.py` with a `TRACKER`, `conf/tracker/<name>.yaml`, and in config/execution_schema.py a
dataclass and a field `<name>` of TrackerConfig. What it shows is tested for all: tests/track/test_all_trackers.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

from distill_cli.config.execution_schema import TrackerConfig
from distill_cli.config.fields import declared_keys
from distill_cli.config.schema import Config
from distill_cli.folders.run_dir import RunDir
from distill_cli.machine.findings import Finding

STREAMS = ("metrics.jsonl", "system.jsonl")
FILES = ("config.yaml", "command.txt", "env.json", "outcome.json", "report.html", "rollouts/*.parquet")
"""Files of a run that trackers get a copy of."""


class Tracker(Protocol):
    """One run at one tracker. `facts` has what it may show of the run. Only `open` to `close` connect."""

    name: ClassVar[str]
    """Its module, and its field of TrackerConfig."""
    label: ClassVar[str]
    """Its name in messages."""
    place: str
    """Its address, or the equivalent, without credentials."""
    page: str
    """Where to see the run: an address, or the command that shows it."""
    logs_model: bool = False
    """Send the trained student's folder too."""
    streams: Sequence[str] = STREAMS
    """The files of metrics that it gets."""
    files: Sequence[str] = FILES
    """Patterns of the other files that it gets."""
    has_one_sender: bool = False
    """Whether no other process may send a run while it lasts."""
    afterwards: ClassVar[Mapping[str, Any]] = {}
    """Settings that take the place of the run's own if it is sent after its end."""

    def __init__(self, settings: Any, config: Config, run: RunDir) -> None: ...

    def identity(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what identifies the run, without connecting: as in `known`, if that belongs to the same place.

        Checkpoints keep it. If it is not what `known` says, nothing of the run counts as sent, and `logged` is called.
        `run_id`, if there is one, is the tracker's own name for the run, None until `open` has made it.
        """

    def open(self, identity: dict[str, Any], *, running: bool) -> None:
        """Connect, find the run or make it, describe it; complete `identity`. Do nothing if that is done.

        Args:
            running: mark the run as running, whatever its status was.
        """

    def logged(self) -> set[tuple[str, int]]:
        """Return the metrics and steps that the tracker has; called if a request may or may not have arrived."""

    def log(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Send rows of metrics, each with its `step` and `time` (seconds since 1970)."""

    def artifact(self, file: Path, name: str) -> None:
        """Send a file; `name` is its path among the run's artifacts. A later version replaces it."""

    def close(self, status: str) -> None:
        """Mark the run as `finished`, `stopped` or `failed`; return when all of it has arrived. Do nothing if not open.

        It may be opened again.
        """

    @classmethod
    def problems(cls, settings: Any) -> Iterator[str]:
        """Yield what is wrong with the settings, each line beginning with the key below `tracker.<name>`."""
        yield from ()

    @classmethod
    def doctor(cls) -> list[Finding]:
        """Return the tracker's lines of `distill doctor`."""
        return []


def tracker_class(name: str) -> type[Tracker]:
    """Import a tracker by its name."""
    return import_module(f"{__package__}.{name}").TRACKER


def tracker_names() -> list[str]:
    """Return the names of all trackers, enabled or not."""
    return [field.name for field in fields(TrackerConfig)]


def trackers_with(key: str) -> list[str]:
    """Return the names of the trackers that have a setting of this name."""
    return [name for name in tracker_names() if f"{name}.{key}" in declared_keys(TrackerConfig)]


def enabled(config: Config) -> dict[str, Any]:
    """Return the settings of each tracker that is enabled."""
    return {name: one for name in tracker_names() if (one := getattr(config.tracker, name)).enabled}


def trackers_of(config: Config, run: RunDir) -> list[Tracker]:
    """Build the enabled trackers of a run."""
    return [tracker_class(name)(settings, config, run) for name, settings in enabled(config).items()]


def tracker_problems(config: Config) -> list[str]:
    """Return one line for each setting of an enabled tracker that is wrong."""
    found = {f"tracker.{name}": tracker_class(name).problems(one) for name, one in enabled(config).items()}
    return [f"{at}.{problem}" for at, problems in found.items() for problem in problems]
