"""The protocol of a launcher, which starts the ranks of runs on this machine or as jobs of a cluster.

A launcher is a file of this folder with an object `LAUNCHER`; its own keys are the section `cluster.<name>`.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from distill_cli.config.choices import nearest
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir, SubmittedJob
from distill_cli.resolved import ResolvedRun

LAUNCHERS = ("local", "slurm")
NODE_PROGRAM = "distill_cli.jobs.prepared_run"
"""A job executes `python -m NODE_PROGRAM RUN` on each of its nodes."""
TEACHER_PROGRAM = "distill_cli.jobs.teacher_node"
"""The job of a teacher calls `serve_teacher` of this module on each of its nodes."""


@dataclass(frozen=True)
class Place:
    """A process's place among the nodes of a job."""

    job_id: str | None = None
    """None outside a job."""
    num_restarts: int = 0
    """How often the cluster has started the job again."""
    node: int = 0
    num_nodes: int = 1
    address: str = "localhost"
    """Where this node reaches the first one."""

    def torchrun_arguments(self, port: int) -> list[str]:
        """Return the arguments with which the agents of all nodes meet on a port of the first."""
        if self.num_nodes == 1:
            return ["--standalone"]
        where = [f"--master-addr={self.address}", f"--master-port={port}"]
        return [f"--nnodes={self.num_nodes}", f"--node-rank={self.node}", *where]

    def command_file(self, run: RunDir) -> Path:
        """Return the file in which the first node commands the others."""
        return run.path / "logs" / f"nodes_{self.job_id}.{self.num_restarts}.json"


ALONE = Place()


class Launcher:
    """A place where runs are started. The defaults are those of a launcher that submits nothing."""

    name: ClassVar[str]
    runs_here: ClassVar[bool] = False
    """Whether the typed command starts the ranks itself instead of submitting jobs."""
    serves_teachers: ClassVar[bool] = False
    """Whether a teacher can have a job of its own: the methods whose names have `teacher` in them."""
    unread: ClassVar[frozenset[str]] = frozenset()
    """Keys of cluster, outside of sections, that have no effect."""

    def resolve(self, config: Config) -> Config:
        """Fill in what the cluster decides, such as the GPUs of a node; nothing if the cluster does not answer."""
        return config

    def problems(self, config: Config, *, num_jobs: int = 1) -> Iterator[str]:
        """Yield what keeps the launcher from taking so many jobs of a resolved config."""
        yield from ()

    def script(self, resolved: ResolvedRun, *, folder: Path, num_jobs: int = 1) -> str:
        """Return what `submit` would give to the cluster, or the command that would run here."""
        raise NotImplementedError

    def submit(
        self, config: Config, runs: Sequence[RunDir], *, folder: Path, after: Sequence[str] = ()
    ) -> list[SubmittedJob]:
        """Queue a job for each prepared run, named after the run's or sweep's `folder`, which takes the output.

        Args:
            after: ids of jobs that must have begun, or ended, before these begin.

        Raises:
            ConfigError: the cluster refuses the jobs.
        """
        return []

    def teacher_problems(self, config: Config, name: str) -> Iterator[str]:
        """Yield what keeps the launcher from taking the job of a teacher, as `problems` does for a run's."""
        yield from ()

    def teacher_script(self, config: Config, name: str, *, folder: Path) -> str:
        """Return what `submit_teacher` would give to the cluster."""
        raise NotImplementedError

    def submit_teacher(self, config: Config, name: str, run: RunDir) -> SubmittedJob:
        """Queue the job that serves a teacher of a run (`config.teacher_jobs`).

        Raises:
            ConfigError: the cluster refuses the job.
        """
        raise NotImplementedError

    def teacher_address(self) -> str:
        """Return the host name or IP address at which other nodes reach this node of a teacher's job."""
        raise NotImplementedError

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End jobs; those that have ended are left alone."""

    def hints(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return what to print about submitted jobs: `job`, and the commands `queue` and `cancel`."""
        return {}

    def is_installed(self) -> bool:
        """Return whether this machine can ask the cluster about jobs."""
        return False

    def status(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the state of each of these jobs that has not ended, in the cluster's terms."""
        return {}

    def end_state(self, job_id: str) -> str:
        """Return what became of a job that has ended; "" if the cluster does not know."""
        return ""

    def place(self) -> Place:
        """Return this process's place among the nodes of its job."""
        return ALONE

    def check_restarts(self, config: Config, place: Place) -> None:
        """Raise DistillError if the cluster has started this job too often."""

    def requeue(self, config: Config, place: Place, *, reason: str) -> None:
        """Queue this process's own job again, and do not return, if the cluster and not the user has stopped it.

        Args:
            reason: why the run stopped: the name of a signal, or of the key that set a limit.
        """

    def tags(self) -> dict[str, str]:
        """Return what trackers record about the job that this process is part of."""
        return {}

    def findings(self) -> list[tuple[str, bool, str, str]]:
        """Return lines of `distill doctor`: name, whether it is fine, detail, fix."""
        return []


def launcher_of(name: str) -> Launcher:
    """Return the launcher that cluster.launcher names. Raises ConfigError if there is none."""
    if name not in LAUNCHERS:
        what = f"no such launcher{nearest(name, LAUNCHERS)} (there are: {', '.join(LAUNCHERS)})"
        raise ConfigError(f"cluster.launcher={name}: {what}")
    launcher: Launcher = importlib.import_module(f"distill_cli.launch.{name}").LAUNCHER
    return launcher
