"""Resolve the jobs that were typed, print their warnings, and make the folders of their runs. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distill_cli.config.checks import inert_overrides
from distill_cli.config.compose import Job
from distill_cli.config.credentials import credentials_environment
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.schema import Config
from distill_cli.config.variation import config_text, save_config
from distill_cli.data.row_check import KnownData
from distill_cli.errors import ConfigError, collect
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import preflight
from distill_cli.launch.base import LAUNCHERS, launcher_of
from distill_cli.models.model_files import NOT_FOUND
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console


def resolve_jobs(jobs: Sequence[Job], *, is_new: bool = True) -> tuple[list[Job], list[ResolvedRun]]:
    """Put each job through `preflight`; return the jobs as resolved by their cluster, and the resolved runs.

    Args:
        is_new: they have no folder yet.

    Raises:
        ConfigError: all problems of all jobs, each once.
    """
    known_data: KnownData = {}
    problems = list(folder_problems(jobs)) if is_new else []

    def resolve(job: Job) -> ResolvedRun:
        try:
            resolved = preflight(job.config, known_data, problems)
        except ConfigError as error:
            raise ConfigError(*error.problems, *how_to_get(job, error.problems)) from error
        inert = inert_overrides(resolved.config, job.overrides)
        unread = unread_keys(resolved.config.cluster, job.overrides)
        return replace(resolved, warnings=(*resolved.warnings, *inert, *unread))

    resolved = collect(partial(resolve, job) for job in jobs)
    return [replace(job, config=one.config) for job, one in zip(jobs, resolved, strict=True)], resolved


def how_to_get(job: Job, problems: Sequence[str]) -> Iterator[str]:
    """Yield where it stands how to get an experiment's models, if some of them are missing."""
    choice = job.choices.get("experiment")
    if choice and any(line.startswith("model.") and NOT_FOUND in line for line in problems):
        yield f"experiment={choice}: its models are made or fetched first; distill ls experiment={choice} says how"


def folder_problems(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield one line for each reason why the folders of new runs cannot be made."""
    for job in jobs:
        if job.config.run.name and single_path(job).exists():
            yield f"{single_path(job)}: this run folder exists already; choose another run.name"
    places = {(job.config.run.root, job.config.run.name) for job in jobs}
    if "latest" in {name for _, name in places}:
        yield "run.name=latest: is the link to the newest run; choose another"
    if len(places) > 1:
        yield "run.name, run.root: a sweep has one folder, with one in it for each run; do not sweep them"


def require_here(config: Config, command: str) -> None:
    """Raise ConfigError if a command that starts ranks on this machine is given a cluster."""
    launcher = config.cluster.launcher
    if not launcher_of(launcher).runs_here:
        fix = "inside an allocation of one node, type cluster=local"
        raise ConfigError(f"cluster.launcher={launcher}: {command} runs where it is typed; {fix}")


def unread_keys(cluster: ClusterConfig, overrides: Sequence[str]) -> Iterator[str]:
    """Warn of overrides that the chosen launcher does not read, such as the section of another one."""
    unread = ({*LAUNCHERS} - {cluster.launcher}) | launcher_of(cluster.launcher).unread
    for key in dict.fromkeys(word.lstrip("+").partition("=")[0] for word in overrides):
        if key.startswith("cluster.") and key.split(".")[1] in unread:
            yield f"{key} has no effect with cluster.launcher={cluster.launcher}"


def print_warnings(resolved: Sequence[ResolvedRun], *, console: Console, printed: set[str]) -> None:
    """Print each warning once; add it to `printed`, which holds those that were printed before."""
    for warning in (warning for one in resolved for warning in one.warnings):
        if warning not in printed:
            console.warn(warning)
            printed.add(warning)


def single_path(job: Job) -> Path:
    """Return the folder of a run that is part of no sweep; it may not exist yet."""
    root, choices, kl_type = Path(job.config.run.root), job.choices, job.config.loss.kl_type
    model = choices.get("experiment") or choices.get("model")
    loss = kl_type.partition(":")[2] or choices.get("loss")  # a function of the user's
    return root / (job.config.run.name or run_dir.free_name(root, run_dir.default_name(str(model), str(loss))))


def prepare(resolved: ResolvedRun, path: Path, *, command: Sequence[str], env: dict[str, Any] | None = None) -> RunDir:
    """Make a run's folder, with what its ranks will read. See `run_dir.create` for `env`.

    Credentials, which are not written, go into this process's environment, for the processes and jobs it starts.
    """
    os.environ |= credentials_environment(resolved.config)
    run = run_dir.create(path.absolute(), command=command, config=config_text(resolved.config), env=env)
    resolved.write(run)
    return run


def write_resolved(run: RunDir, resolved: ResolvedRun) -> None:
    """Write config.yaml and resolved.json. Credentials go into this process's environment, as in `prepare`."""
    save_config(resolved.config, run.config)
    resolved.write(run)
    os.environ |= credentials_environment(resolved.config)


def make_bare_run(folder: Path, resolved: ResolvedRun) -> RunDir:
    """Make a folder with only what ranks read and write, for ranks that train no new run."""
    run = RunDir(folder)
    run.logs.mkdir(parents=True)
    write_resolved(run, resolved)
    return run
