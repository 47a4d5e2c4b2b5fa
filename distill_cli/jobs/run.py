"""One run: its checks, its folder, its attempts, and the summary that is printed at the end."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from distill_cli import memory
from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.checks import inert_overrides
from distill_cli.config.compose import Job, config_text, known_losses, load_config
from distill_cli.config.credentials import credentials_environment
from distill_cli.config.derived import needs_scorer
from distill_cli.config.schema import Config
from distill_cli.data.recorded_run import remove_later
from distill_cli.errors import ConfigError, DistillError, Killed, Unrecoverable
from distill_cli.folders import run_dir
from distill_cli.folders.attempts import attempts_of, recorded, told
from distill_cli.folders.metrics_file import cut_back, read_metrics
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.jobs.preflight import Preflight, preflight
from distill_cli.launch.local import Stopped, launch
from distill_cli.launch.nodes import Head
from distill_cli.launch.placement import hub_cache, placement
from distill_cli.machine import hardware
from distill_cli.models import model_files
from distill_cli.report.read import read_results
from distill_cli.terminal.console import Console
from distill_cli.track.base import trackers_of
from distill_cli.track.run_tracking import tracking


@dataclass
class Status:
    value: int = 0


@contextmanager
def exit_status() -> Iterator[Status]:
    """0, or what a signal that stopped the run makes of it."""
    status = Status()
    try:
        yield status
    except Stopped as stopped:
        print(f"stopped by {stopped}; no process was left behind", file=sys.stderr)
        status.value = 128 + stopped.signum


def check_jobs(jobs: Sequence[Job], *, is_new: bool = True) -> list[Preflight]:
    """Every job through `preflight`; all problems of all jobs at once, each said once.

    Args:
        is_new: no folder is there for them yet.
    """
    for job in jobs[:1]:
        os.environ |= hub_cache(job.config.cluster)  # before huggingface_hub reads it
    found, problems, known_data = [], {}, {}
    for job in jobs:
        try:
            found.append(preflight(job.config, known_data))
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
    return found


def single_path(job: Job) -> Path:
    root = Path(job.config.run.root)
    return root / (job.config.run.name or run_dir.free_name(root, run_dir.default_name(job.choices)))


def prepare(job: Job, path: Path, *, command: Sequence[str], env: dict[str, Any] | None = None) -> RunDir:
    """Makes a run's folder, with the config that its ranks will read. See `run_dir.create` for `env`.

    Credentials, which are not written, are left in this process' environment, for what it starts or submits.
    """
    os.environ |= credentials_environment(job.config)
    return run_dir.create(path.absolute(), command=command, config=config_text(job.config), env=env)


def introduce(job: Job, found: Preflight, run: RunDir, *, console: Console) -> None:
    """Prints what is about to run, and what is to be minded; leaves the predicted memory in the folder."""
    write_memory(job.config, found, run)
    print_warnings([job], [found], console=console, told=set())
    console.print(start_panel(job, found, run))


def print_warnings(jobs: Sequence[Job], checked: Sequence[Preflight], *, console: Console, told: set[str]) -> None:
    """What is to be minded of jobs, each once; those in `told` were said before, and what is said goes there."""
    for job, found in zip(jobs, checked, strict=True):
        for warning in [*found.warnings, *inert_overrides(job.config, job.overrides, known_losses())]:
            if warning not in told:
                console.print(f"warning: {escape(warning)}")
                told.add(warning)


def write_memory(config: Config, found: Preflight, run: RunDir) -> None:
    """What a rank is expected to hold, by part, for the report; no file where it cannot be told."""
    is_gpu = bool(hardware.gpus_per_node(config))
    ranks = hardware.ranks_per_node(config) * config.cluster.nodes
    gpu_bytes = (hardware.gpu_memory() or 0) if is_gpu else None
    with suppress(memory.NoPrediction):
        shape = memory.read_shape(found.student, config.model.student.lora)
        predicted = memory.predict(config, shape, found.student, found.teacher, num_ranks=ranks, gpu_bytes=gpu_bytes)
        parts = {**predicted.trainer.parts, **predicted.engines}
        run_dir.write_json(run.memory, {"peak": predicted.peak, "asleep": predicted.asleep, "parts": parts})


def leave_report(paths: Sequence[Path], file: Path, *, console: Console) -> None:
    """The page about these runs. One that cannot be made is a warning: what it would show is all there."""
    from distill_cli.report.html import write_report  # its libraries take a while to import

    try:
        write_report(read_results(paths), file)
    except Exception as error:
        if os.environ.get("DISTILL_DEBUG"):
            raise
        console.print(f"warning: no {file.name} could be made: {escape(f'{type(error).__name__}: {error}')}")


def job_of(run: RunDir) -> Job:
    """The job that a run's folder was made for: its config, and what was typed."""
    typed = shlex.split(run.command.read_text())[1:] if run.command.exists() else []
    return Job(config=load_config(run.config), choices={}, overrides=[word for word in typed if "=" in word], swept=[])


def locate_models(config: Config) -> None:
    """Brings both models onto this machine, before its ranks start: they look in the cache alone."""
    model = config.model
    model_files.locate(model.student.path, revision=model.student.revision, key="model.student.path")
    if needs_scorer(config):
        model_files.locate(model.teacher.path, revision=model.teacher.revision, key="model.teacher.path")
    if model.tokenizer is not None:
        model_files.locate(model.tokenizer, key="model.tokenizer")


def carry_out(job: Job, run: RunDir, *, console: Console, head: Head | None = None) -> dict[str, Any]:
    """Attempt after attempt until the run has ended; what `outcome.json` says then. The folder is locked.

    Args:
        head: speaks with the nodes of the job that this is part of; None outside a job.

    Raises:
        DistillError: an attempt failed, and no other may follow or would fare better.
        Stopped: the user or the system stopped it.
    """
    if head is None:
        run.slurm.unlink(missing_ok=True)  # a job that it once was says nothing of it any more
    try:
        with tracking(job.config, run):
            try:
                attempts(job.config, run, console=console, head=head)
            except DistillError:
                if run.metrics.exists():  # how far it came
                    leave_report([run.path], run.report, console=console)
                raise
            leave_report([run.path], run.report, console=console)
    except Stopped:
        outcome = tell_attempts(run)
        saved = "the last checkpoint is what is left"
        if outcome is not None:
            saved = f"saved after step {outcome['num_steps']}" if outcome["num_steps"] else "no step is done yet"
        console.print(f"stopped: {saved}; distill resume {shown(run.path)} goes on")
        raise
    outcome = tell_attempts(run)
    if outcome["state"] == "stopped":
        console.print(f"stopped by {escape(outcome['reason'])} after step {outcome['num_steps']}")
        console.print(f"go on    distill resume {shown(run.path)}")
    else:
        console.print(end_panel(job, outcome, run))
    return outcome


def attempts(config: Config, run: RunDir, *, console: Console, head: Head | None) -> None:
    """Starts the ranks, and starts them again from the newest checkpoint where they failed and that may help."""
    launched = time.time()
    for number in itertools.count():
        start = begin_attempt(run, console=console)
        first_step = start.recorded_step if start else 0
        try:
            with recorded(run, launched=launched, from_step=start.step if start else 0):
                launch(
                    run,
                    num_ranks=hardware.ranks_per_node(config),
                    use_gpus=hardware.gpus_per_node(config) > 0,
                    checkpoint=start.path if start else None,
                    hang_timeout_s=config.cluster.hang_timeout_s,
                    grace_s=config.cluster.grace_s,
                    head=head,
                    env=placement(config.cluster),
                )
            return
        except (ConfigError, Unrecoverable):
            raise
        except DistillError as error:
            got_on = bool(run.metrics.exists() and read_metrics(run.metrics, after_step=first_step))
            if number == config.cluster.max_restarts or not (got_on or isinstance(error, Killed)):
                raise
            console.print(f"warning: attempt {run.attempt} failed: {escape(str(error))}")
            run = run.next_attempt()


def begin_attempt(run: RunDir, *, console: Console) -> Checkpoint | None:
    """Brings the folder back to its newest whole checkpoint, which is returned; None begins at the beginning."""
    store.remove_unfinished(run.checkpoints)
    start = store.newest_whole(run.checkpoints, warn=lambda text: console.print(f"warning: {escape(text)}"))
    run.outcome.unlink(missing_ok=True)
    remove_later(run.scores, step=start.step if start else 0)
    cut_back(
        run.metrics,
        last_step=start.recorded_step if start else -1,
        removed_to=run.path / f"metrics.cut_{run.attempt}.jsonl",
    )
    if start is not None:
        console.print(f"attempt {run.attempt} goes on from the checkpoint of step {start.step}")
    elif run.attempt > 1:
        console.print(f"attempt {run.attempt} begins at the beginning: there is no checkpoint yet")
    return start


def tell_attempts(run: RunDir) -> dict[str, Any] | None:
    """`outcome.json`, with how each attempt ended added to it; None where the ranks did not come to it."""
    outcome = read_outcome(run)
    if outcome is not None:
        outcome["attempts"] = [asdict(attempt) for attempt in attempts_of(run)]
        write_json(run.outcome, outcome)
    return outcome


def read_outcome(run: RunDir) -> dict[str, Any] | None:
    """What the ranks said when they ended; None where they did not come to it."""
    return json.loads(run.outcome.read_text()) if run.outcome.exists() else None


def start_panel(job: Job, found: Preflight, run: RunDir) -> Panel:
    config = job.config
    ranks, gpus = hardware.ranks_per_node(config), hardware.gpus_per_node(config)
    rows = {
        "student": config.model.student.path,
        "teacher": config.model.teacher.path + (" (recorded)" if config.rollout.replay else ""),
        "loss": f"{config.loss.kl_type}, top-{config.loss.topk}, tail {config.loss.tail.value}",
        "data": f"{training_rows(config, found)}, {validation_rows(found)} for validation",
        "steps": f"{found.num_steps(config)} of {config.rollout.prompts_per_step} prompts",
        "ranks": f"{ranks} on {'GPUs' if gpus else 'the CPU'}"
        + (f" of each of {config.cluster.nodes} nodes" if config.cluster.nodes > 1 else ""),
        "folder": shown(run.path),
    }
    return Panel(_rows(rows), title="distill", title_align="left", expand=False)


def training_rows(config: Config, found: Preflight) -> str:
    if found.num_recorded is not None:
        return f"{found.num_recorded:,} recorded steps of {shown(Path(config.rollout.replay))}"
    return f"{count(found.num_train)} training rows"


def validation_rows(found: Preflight) -> str:
    return "none" if found.num_validation == 0 else count(found.num_validation)


def count(rows: int | None) -> str:
    return "streamed" if rows is None else f"{rows:,}"


def end_panel(job: Job, outcome: dict[str, Any], run: RunDir) -> Panel:
    """What came of it, where it lies, what to type next."""
    rows = {}
    if outcome["after"]:
        parts = [f"{outcome['before']['accuracy']:.1%} before"] if outcome["before"] else []
        parts.append(f"{outcome['after']['accuracy']:.1%} after")
        if outcome["teacher"]:
            parts.append(f"the teacher {outcome['teacher']['accuracy']:.1%}")
        rows["accuracy"] = ", ".join(parts) + f" ({outcome['after']['num_samples']} held-out prompts)"
    if outcome["gap_closed"] is not None:
        rows["gap closed"] = f"{outcome['gap_closed']:.0%}"
    if outcome["best"]:
        rows["best"] = "{metric} {value:.4g} at step {step}".format(**outcome["best"])
    rows["time"] = f"{outcome['num_steps']} steps in {outcome['seconds']:.0f} s"
    earlier = attempts_of(run)[:-1]
    if earlier:
        rows["earlier"] = "\n".join(told(earlier))
    rows["student"] = shown(run.student)
    rows["metrics"] = shown(run.metrics)
    if run.report.exists():
        rows["report"] = shown(run.report)
    rows |= {tracker.label: tracker.page for tracker in trackers_of(job.config, run)}
    replay = job.config.rollout.replay
    begin = ["distill", *(["replay", shown(Path(replay))] if replay else [])]
    rows["next"] = shlex.join([*begin, *_repeatable(job.overrides), next_override(job)])
    return Panel(_rows(rows), title="done", title_align="left", expand=False)


def next_override(job: Job) -> str:
    """Something worth trying after this run."""
    return "loss=reverse" if job.choices.get("loss") != "reverse" else "loss=forward"


def _rows(rows: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table


def shown(path: Path) -> str:
    """Relative to the current folder where it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _repeatable(overrides: Sequence[str]) -> list[str]:
    """The overrides that the next command can repeat: a run's name is its own, and the loss is what changes."""
    taken = ("loss=", "loss.kl_type=", "loss.kl_weight=", "loss.skew=", "run.name=", "hydra/", "hydra.")
    return [override for override in overrides if not override.lstrip("+").startswith(taken)]
