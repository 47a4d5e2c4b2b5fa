"""The panels that a run prints before its first step and after its last."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from distill_cli.config.compose import Job
from distill_cli.folders.attempts import Outcome, attempt_lines, attempts_of
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.divergence import PARAMETERS
from distill_cli.resolved import ResolvedRun
from distill_cli.track.base import trackers_of


def start_panel(found: ResolvedRun, run: RunDir) -> Panel:
    config, ranks = found.config, found.ranks
    rows = {
        "student": config.model.student.path,
        "teacher": config.model.teacher.path + (" (recorded)" if config.rollout.replay else ""),
        "loss": f"{config.loss.kl_type}, top-{config.loss.topk}, tail {config.loss.tail.value}",
        "data": f"{training_rows(found)}, {validation_rows(found)} for validation",
        "steps": f"{found.num_steps} of {config.rollout.prompts_per_step} prompts",
        "ranks": f"{ranks.per_node} on {'GPUs' if ranks.on_gpus else 'the CPU'}"
        + (f" of each of {ranks.num_nodes} nodes" if ranks.num_nodes > 1 else ""),
        "folder": relative(run.path),
    }
    return Panel(rows_table(rows), title="distill", title_align="left", expand=False)


def training_rows(found: ResolvedRun) -> str:
    if found.num_recorded_steps is not None:
        return f"{found.num_recorded_steps:,} recorded steps of {relative(Path(found.config.rollout.replay))}"
    return f"{_count(found.num_train_rows)} training rows"


def validation_rows(found: ResolvedRun) -> str:
    return "none" if found.num_validation_rows == 0 else _count(found.num_validation_rows)


def end_panel(job: Job, outcome: Outcome, run: RunDir) -> Panel:
    """What came of a run, where it is, what to type next."""
    rows = {}
    if after := outcome.after:
        parts = [f"{outcome.before['accuracy']:.1%} before"] if outcome.before else []
        parts.append(f"{after['accuracy']:.1%} after")
        if outcome.teacher:
            parts.append(f"the teacher {outcome.teacher['accuracy']:.1%}")
        rows["accuracy"] = ", ".join(parts) + f" ({after['num_samples']} held-out prompts)"
    if outcome.gap_closed is not None:
        rows["gap closed"] = f"{outcome.gap_closed:.0%}"
    if outcome.best:
        rows["best"] = "{metric} {value:.4g} at step {step}".format(**outcome.best)
    rows["time"] = f"{outcome.num_steps} steps in {outcome.seconds:.0f} s"
    if earlier := attempts_of(run)[:-1]:
        rows["earlier"] = "\n".join(attempt_lines(earlier))
    rows["student"] = relative(run.student)
    rows["metrics"] = relative(run.metrics)
    if run.report.exists():
        rows["report"] = relative(run.report)
    rows |= {tracker.label: tracker.page for tracker in trackers_of(job.config, run)}
    rows["next"] = _next_command(job)
    return Panel(rows_table(rows), title="done", title_align="left", expand=False)


def relative(path: Path) -> str:
    """Return a path relative to the current folder if it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _next_command(job: Job) -> str:
    """Return something worth trying after this run: another loss."""
    replay, loss = job.config.rollout.replay, "forward" if job.choices.get("loss") == "reverse" else "reverse"
    verb = ["replay", relative(Path(replay))] if replay else []
    return shlex.join(["distill", *verb, *_repeatable(job.overrides), f"loss={loss}"])


def _repeatable(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that the next command can repeat: not a run's name, and not what changes."""
    own = [f"loss.{name}=" for name in ("kl_type", *PARAMETERS)]
    others = ("loss=", *own, "loss.kwargs", "run.name=", "hydra/", "hydra.")
    return [override for override in overrides if not override.lstrip("+").startswith(others)]


def _count(rows: int | None) -> str:
    return "streamed" if rows is None else f"{rows:,}"


def rows_table(rows: Mapping[str, str], *, title: str | None = None, min_width: int | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", min_width=min_width)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table
