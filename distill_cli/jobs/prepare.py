"""Jobs before they start: what their cluster decides, all that is wrong with them, warnings, and their folders."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from distill_cli import memory
from distill_cli.config.checks import inert_overrides
from distill_cli.config.compose import Job, config_text, known_losses, load_config
from distill_cli.config.schema import ClusterConfig, Config
from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import Preflight, preflight
from distill_cli.launch.base import launcher_of
from distill_cli.machine import hardware
from distill_cli.terminal.console import Console


def resolve_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Fill in what their cluster decides. Raises ConfigError if there is no such launcher."""
    return [replace(job, config=launcher_of(job.config.cluster.launcher).resolve(job.config)) for job in jobs]


def check_jobs(jobs: Sequence[Job], *, is_new: bool = True) -> list[Preflight]:
    """Put each job through `preflight`; raise all problems of all jobs at once, each once.

    Args:
        is_new: they have no folder yet.
    """
    checked, problems, known_data = [], {}, {}
    for job in jobs:
        try:
            checked.append(preflight(job.config, known_data))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    names = {job.config.run.name for job in jobs}
    if "latest" in names:
        problems["run.name=latest: is the link to the newest run; choose another"] = None
    roots = {job.config.run.root for job in jobs}
    for job in jobs:
        if is_new and job.config.run.name and single_path(job).exists():
            problems[f"{single_path(job)}: this run folder exists already; choose another run.name"] = None
    if len(names) > 1 or len(roots) > 1:
        problems["run.name, run.root: a sweep has one folder, with one in it for each run; do not sweep them"] = None
    if problems:
        raise ConfigError(*problems)
    return checked


def require_here(config: Config, command: str) -> None:
    """Raise ConfigError if a command that starts ranks on this machine is given a cluster."""
    launcher = config.cluster.launcher
    if not launcher_of(launcher).runs_here:
        raise ConfigError(
            f"cluster.launcher={launcher}: {command} runs where it is typed; inside an allocation of one node, type "
            "cluster=local"
        )


def job_warnings(job: Job, checked: Preflight) -> list[str]:
    """Return all warnings about a job: of preflight, and of overrides that have no effect."""
    inert = inert_overrides(job.config, job.overrides, known_losses())
    return [*checked.warnings, *inert, *unread_keys(job.config.cluster, job.overrides)]


def unread_keys(cluster: ClusterConfig, overrides: Sequence[str]) -> Iterator[str]:
    """Warn of overrides that the chosen launcher does not read, such as the section of another one."""
    sections = {field.name for field in fields(cluster) if is_dataclass(getattr(cluster, field.name))}
    unread = (sections - {cluster.launcher}) | launcher_of(cluster.launcher).unread
    for key in dict.fromkeys(override.lstrip("+").split("=", 1)[0] for override in overrides):
        group, _, name = key.partition(".")
        if group == "cluster" and name.split(".")[0] in unread:
            yield f"{key} has no effect with cluster.launcher={cluster.launcher}"


def print_warnings(jobs: Sequence[Job], checked: Sequence[Preflight], *, console: Console, printed: set[str]) -> None:
    """Print each warning once; add it to `printed`, which holds those that were printed before."""
    for job, found in zip(jobs, checked, strict=True):
        for warning in job_warnings(job, found):
            if warning not in printed:
                console.print(f"warning: {escape(warning)}")
                printed.add(warning)


def single_path(job: Job) -> Path:
    """Return where the folder of a run that is part of no sweep will be."""
    root = Path(job.config.run.root)
    return root / (job.config.run.name or run_dir.free_name(root, run_dir.default_name(job.choices)))


def prepare(
    job: Job, checked: Preflight, path: Path, *, command: Sequence[str], env: dict[str, Any] | None = None
) -> RunDir:
    """Make a run's folder: the config that its ranks will read, and for the report a rank's predicted memory by part.

    Args:
        env: see `run_dir.create`.
    """
    config = job.config
    run = run_dir.create(path.absolute(), command=command, config=config_text(config), env=env)
    is_gpu = bool(hardware.gpus_per_node(config))
    ranks = hardware.ranks_per_node(config) * config.cluster.nodes
    gpu_bytes = (hardware.gpu_memory() or 0) if is_gpu else None
    with suppress(memory.NoPrediction):
        shape = memory.read_shape(checked.student, config.model.student.lora)
        folders = (checked.student, checked.teacher)
        predicted = memory.predict(config, shape, *folders, num_ranks=ranks, gpu_bytes=gpu_bytes)
        parts = {**predicted.trainer.parts, **predicted.engines}
        run_dir.write_json(run.memory, {"peak": predicted.peak, "asleep": predicted.asleep, "parts": parts})
    return run


def job_of(run: RunDir) -> Job:
    """Return the job that a run's folder was made for: its config, and the overrides that were typed."""
    words = shlex.split(run.command.read_text())[1:] if run.command.exists() else []
    return Job(config=load_config(run.config), choices={}, overrides=[word for word in words if "=" in word], swept=[])
