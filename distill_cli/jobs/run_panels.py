"""The panels that a run prints before its first step and after its last."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from distill_cli.config.derived import ends_by_epochs, validates
from distill_cli.config.loss_schema import describe_loss
from distill_cli.config.schema import Config
from distill_cli.config.teacher_jobs import teacher_nodes
from distill_cli.config.teachers import ONLY, teacher_configs
from distill_cli.config.variation import plain
from distill_cli.folders.attempts import Outcome, attempt_lines, attempts_of
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.machine.hardware import threads_of_rank
from distill_cli.models.traits import Traits
from distill_cli.report.verdict import verdict
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.base import trackers_of

Rows = dict[str, str | None]
"""Lines of a table by name; None leaves a line out."""


def start_panel(resolved: ResolvedRun, run: RunDir) -> Panel:
    """Show what is about to run: models, loss, data, steps, ranks, folder."""
    config, ranks = resolved.config, resolved.ranks
    nodes = f" of each of {ranks.num_nodes} nodes" if ranks.num_nodes > 1 else ""
    rows: Rows = {
        "student": config.model.student.path,
        **teacher_rows(resolved),
        "loss": describe_loss(plain(config)),
        "data": f"{training_rows(resolved)}, {validation_rows(resolved)} for validation",
        "steps": f"{resolved.num_steps} of {step_row(config)}",
        "ranks": f"{ranks.per_node} on {'GPUs' if ranks.on_gpus else cores_row(resolved)}{nodes}",
        **roles_row(resolved),
        "layout": layout_row(resolved),
        "folder": relative(run.path),
    }
    return Panel(rows_table(rows), title="distill", title_align="left", expand=False)


def step_row(config: Config) -> str:
    """Say what a step samples, and with which weights if not with the current ones."""
    rollout = config.rollout
    text = f"{rollout.prompts_per_step} prompts"
    if not ends_by_epochs(config):
        share = rollout.token_budget // rollout.num_sequences
        text = f"{rollout.token_budget:,} tokens, about {share} of each of {rollout.num_sequences} answers"
    if rollout.staleness and rollout.replay is None:
        text += f", sampled {rollout.staleness} step{'s' * (rollout.staleness > 1)} before"
    return text


def teacher_rows(resolved: ResolvedRun) -> Rows:
    """Return the path of each teacher, and the nodes of its own."""
    recorded = " (recorded)" if resolved.recorded_run else ""
    alone, nodes = teacher_configs(resolved.config), teacher_nodes(resolved.config)
    return {
        "teacher" if name == ONLY else f"teacher {name}": f"{one.model.teacher.path}{own_nodes(nodes[name])}"
        if name in nodes
        else f"{one.model.teacher.path}{recorded}"
        for name, one in alone.items()
    }


def own_nodes(number: int) -> str:
    """Say how many nodes a teacher has of its own."""
    return f" on {number} {'node' if number == 1 else 'nodes'} of its own"


def roles_row(resolved: ResolvedRun) -> dict[str, str]:
    """Say who trains, who samples and who scores, if each rank does one of them."""
    ranks, lag = resolved.ranks, resolved.config.rollout.staleness
    if ranks.trainers == ranks.total:
        return {}
    names = list(teacher_configs(resolved.config))
    sizes = [(ranks.trainers, "train" if all(ranks.scorers) else "train and score"), (ranks.samplers, "sample")]
    scorers = zip(names, ranks.scorers, strict=True)
    sizes += [(size, "score" + ("" if one == ONLY else f" with {one}")) for one, size in scorers]
    first, parts = 0, []
    for size, does in sizes:
        if size:
            parts.append(f"{first} {does}" if size == 1 else f"{first} to {first + size - 1} {does}")
        first += size
    how = f"at the same time, {lag} step{'s' * (lag > 1)} ahead" if lag else "in turn, as rollout.staleness is 0"
    return {"roles": f"ranks {', '.join(parts)}: {how}"}


def cores_row(resolved: ResolvedRun) -> str:
    """Say how many threads a rank has."""
    threads = str(resolved.config.cluster.env.get("OMP_NUM_THREADS", threads_of_rank(resolved.ranks.per_node)))
    return f"the CPU, {threads} {'thread' if threads == '1' else 'threads'} each"


def layout_row(resolved: ResolvedRun) -> str | None:
    """Say why sequences are not packed, if it is the student that cannot have it."""
    reasons = ", ".join(Traits.read(resolved.student.folder).needs_rows)
    return f"rows of one document each: {reasons}" if reasons else None


def training_rows(resolved: ResolvedRun) -> str:
    if resolved.recorded_run is not None:
        return f"{resolved.num_recorded_steps:,} recorded steps of {relative(resolved.recorded_run)}"
    return f"{_count(resolved.num_train_rows)} training rows"


def validation_rows(resolved: ResolvedRun) -> str:
    return "none" if resolved.num_validation_rows == 0 else _count(resolved.num_validation_rows)


def end_panel(resolved: ResolvedRun, outcome: Outcome, run: RunDir) -> Panel:
    """Show a run's results, what its metrics say, where its files are, and what to type next."""
    before, after, teacher, best = outcome.before, outcome.after, outcome.teacher, outcome.best
    scores = {"{} before": before, "{} after": after, "the teacher {}": teacher}
    parts = [text.format(f"{found['accuracy']:.1%}") for text, found in scores.items() if found]
    rows: Rows = {
        "accuracy": f"{', '.join(parts)} ({after['num_samples']} held-out prompts)" if after else None,
        "gap closed": None if outcome.gap_closed is None else f"{outcome.gap_closed:.0%}",
        "best": "{metric} {value:.4g} at step {step}".format(**best) if best else None,
        "verdict": "\n".join(verdict(read_metrics(run.metrics), plain(resolved.config))) or None,
        "time": f"{outcome.num_steps} steps in {outcome.seconds:.0f} s",
        "earlier": "\n".join(attempt_lines(attempts_of(run)[:-1])) or None,
        "student": relative(run.student),
        "metrics": relative(run.metrics),
        "report": relative(run.report) if run.report.exists() else None,
        **{tracker.label: tracker.page for tracker in trackers_of(resolved.config, run)},
        "next": "\n".join(next_commands(resolved, run)),
    }
    return Panel(rows_table(rows), title="done", title_align="left", expand=False)


def relative(path: Path) -> str:
    """Return a path relative to the current folder if it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def next_commands(resolved: ResolvedRun, run: RunDir) -> Iterator[str]:
    """Yield commands to type next: talk to the student, measure it, train on the recorded answers with another loss."""
    config, folder = resolved.config, relative(run.path)
    recording = resolved.recorded_run or (run.path if config.rollout.save_scores else None)
    if recording is not None:
        loss = "forward" if config.loss.kl_type == "reverse" else "reverse"
        yield shlex.join(["distill", "replay", relative(recording), f"loss={loss}"])
    yield shlex.join(["distill", "chat", folder])
    if validates(config):
        yield shlex.join(["distill", "eval", folder, "--against", "before", "teacher"])


def _count(rows: int | None) -> str:
    return "streamed" if rows is None else f"{rows:,}"


def rows_table(rows: Rows, *, title: str | None = None, min_width: int | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", min_width=min_width)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(value))
    return table


def print_lines(console: Console, lines: Mapping[str, object]) -> None:
    for name, text in lines.items():
        console.print(f"{name:8} {escape(str(text))}")
