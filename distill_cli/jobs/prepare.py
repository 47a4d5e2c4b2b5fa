"""Jobs before they start: what their cluster decides, all that is wrong with them, warnings, and their folders."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from distill_cli.config.checks import inert_overrides
from distill_cli.config.compose import Job
from distill_cli.config.credentials import credentials_environment
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.schema import Config
from distill_cli.config.variation import config_text, load_config
from distill_cli.data.row_check import DataFacts
from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import preflight
from distill_cli.launch.base import launcher_of
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console


def resolve_jobs(jobs: Sequence[Job], *, is_new: bool = True) -> tuple[list[Job], list[ResolvedRun]]:
    """Put each job through `preflight`; return the jobs with what their cluster has filled in, and what they come to.

    Args:
        is_new: they have no folder yet.

    Raises:
        ConfigError: all problems of all jobs, each once.
    """
    resolved: list[ResolvedRun] = []
    problems: dict[str, None] = {}
    known_data: dict[str, DataFacts] = {}
    for job in jobs:
        try:
            resolved.append(preflight(job.config, known_data))
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
    return [replace(job, config=found.config) for job, found in zip(jobs, resolved, strict=True)], resolved


def require_here(config: Config, command: str) -> None:
    """Raise ConfigError if a command that starts ranks on this machine is given a cluster."""
    launcher = config.cluster.launcher
    if not launcher_of(launcher).runs_here:
        raise ConfigError(
            f"cluster.launcher={launcher}: {command} runs where it is typed; inside an allocation of one node, type "
            "cluster=local"
        )


def job_warnings(job: Job, found: ResolvedRun) -> list[str]:
    """Return all warnings about a job: of preflight, and of overrides that have no effect."""
    inert = inert_overrides(job.config, job.overrides)
    return [*found.warnings, *inert, *unread_keys(job.config.cluster, job.overrides)]


def unread_keys(cluster: ClusterConfig, overrides: Sequence[str]) -> Iterator[str]:
    """Warn of overrides that the chosen launcher does not read, such as the section of another one."""
    sections = {field.name for field in fields(cluster) if is_dataclass(getattr(cluster, field.name))}
    unread = (sections - {cluster.launcher}) | launcher_of(cluster.launcher).unread
    for key in dict.fromkeys(override.lstrip("+").split("=", 1)[0] for override in overrides):
        group, _, name = key.partition(".")
        if group == "cluster" and name.split(".")[0] in unread:
            yield f"{key} has no effect with cluster.launcher={cluster.launcher}"


def print_warnings(
    jobs: Sequence[Job], resolved: Sequence[ResolvedRun], *, console: Console, printed: set[str]
) -> None:
    """Print each warning once; add it to `printed`, which holds those that were printed before."""
    for job, found in zip(jobs, resolved, strict=True):
        for warning in job_warnings(job, found):
            if warning not in printed:
                console.print(f"warning: {escape(warning)}")
                printed.add(warning)


def single_path(job: Job) -> Path:
    """Return where the folder of a run that is part of no sweep will be."""
    root = Path(job.config.run.root)
    return root / (job.config.run.name or run_dir.free_name(root, run_dir.default_name(job.choices)))


def prepare(found: ResolvedRun, path: Path, *, command: Sequence[str], env: dict[str, Any] | None = None) -> RunDir:
    """Make a run's folder, with what its ranks will read. See `run_dir.create` for `env`.

    Credentials, which are not written, are left in this process's environment, for what it starts or submits.
    """
    os.environ |= credentials_environment(found.config)
    run = run_dir.create(path.absolute(), command=command, config=config_text(found.config), env=env)
    found.write(run)
    return run


def job_of(run: RunDir) -> Job:
    """Return the job that a run's folder was made for: its config, and the overrides that were typed."""
    words = shlex.split(run.command.read_text())[1:] if run.command.exists() else []
    return Job(config=load_config(run.config), choices={}, overrides=[word for word in words if "=" in word], swept=[])
