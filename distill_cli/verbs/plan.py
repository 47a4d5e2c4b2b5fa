"""Compose and check everything, print what would run, start nothing.

Prints the mesh and who holds what, the arithmetic of a step, memory by part, the command or the sbatch script, and
whatever a run would refuse or warn of.

examples
  distill plan
  distill plan --measure
  distill plan model=qwen3_1.7b_4b data.train.path=train.jsonl data.validation.path=test.jsonl
  distill plan cluster.ranks_per_node=2 mesh.tensor=2
"""

from __future__ import annotations

import argparse
import math
import platform
import textwrap
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from distill_cli.config.compose import Job, compose
from distill_cli.config.derived import micro_batches_per_update, updates_per_step, validates
from distill_cli.config.execution_schema import EngineModelConfig
from distill_cli.config.flags import add_hydra_flags
from distill_cli.config.schema import Config, LoraSync
from distill_cli.jobs.prepare import job_warnings, resolve_jobs, single_path
from distill_cli.jobs.run_panels import training_rows, validation_rows
from distill_cli.launch.base import launcher_of
from distill_cli.machine import hardware
from distill_cli.models import model_files
from distill_cli.models.lora_names import targeted
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import Parser
from distill_cli.verbs.measure import Pace, check_measurable, measure


def declare(parser: Parser) -> None:
    parser.takes_overrides()
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run the first steps here, and print seconds by stage, over an epoch and the run; leaves nothing behind",
    )
    parser.takes_wait(help="as in `distill train`, to plan the same line")
    add_hydra_flags(parser)


def main(arguments: argparse.Namespace) -> int:
    """Check and print each job; with `--measure` also run the first steps of the only one."""
    jobs = compose(arguments.overrides, arguments.flags)
    if arguments.measure:
        check_measurable(jobs)
    jobs, resolved = resolve_jobs(jobs)
    for job, found in zip(jobs, resolved, strict=True):
        print_plan(job, found)
        if arguments.measure:
            print_pace(job, found, measure(job, found))
            return 0
    if jobs:
        print_launch(jobs)
    return 0


def print_plan(job: Job, found: ResolvedRun) -> None:
    """Prints what a checked job would do; starts nothing."""
    console = Console(highlight=False)
    console.print(_table("mesh", mesh_rows(found)))
    for line in mesh_drawing(found):
        console.print(f"  {line}", markup=False)
    console.print(_table("a step", step_rows(found)))
    console.print(_table("the run", run_rows(found)))
    console.print(_table("memory of a rank, GiB", memory_rows(found)))
    for warning in job_warnings(job, found):
        console.print(f"warning: {escape(warning)}")


def print_launch(jobs: Sequence[Job]) -> None:
    """Print the folder, and the command or script that would start these jobs: one for all that are one array."""
    config, folder = jobs[0].config, single_path(jobs[0]).absolute()
    text = launcher_of(config.cluster.launcher).script(config, folder=folder, num_jobs=len(jobs))
    Console(highlight=False).print(_table("launch", {"folder": str(folder)}))
    print(textwrap.indent(text.strip(), "  "))


def mesh_rows(found: ResolvedRun) -> dict[str, str]:
    config, mesh, ranks = found.config, found.config.mesh, found.ranks.total
    shards = ranks // mesh.replicate  # parts into which weights, gradients and optimizer are cut
    rows = {
        "ranks": f"{ranks} on {'GPUs' if found.ranks.on_gpus else 'the CPU'}",
        "student's engines": engine_row(found, config.engine.student),
        "teacher's engines": engine_row(found, config.engine.teacher),
        "shard": f"{ranks // (mesh.tensor * mesh.context * mesh.replicate)}: each takes a share of the sequences",
        "replicate": f"{mesh.replicate}: copies of the sharded student",
        "context": f"{mesh.context}: share each sequence",
        "tensor": f"{mesh.tensor}: share each layer's matrices"
        + (", and the tokens between them" if mesh.sequence_parallel else ""),
    }
    rows = {name: text for name, text in rows.items() if name in ("ranks", "shard") or not text.startswith("1:")}
    return rows | {"of a rank": f"1/{shards} of weights, gradients and optimizer"}


MOST_LINES = 16


def mesh_drawing(found: ResolvedRun) -> list[str]:
    """Each rank by its place: a line is one share of the sequences, a bracket the ranks that share a layer's matrices.

    Nothing where there is one rank.
    """
    mesh, ranks, per_node = found.config.mesh, found.ranks.total, found.ranks.per_node
    if ranks == 1:
        return []
    shards, width = ranks // (mesh.replicate * mesh.context * mesh.tensor), len(str(ranks - 1))
    numbers, lines = iter(range(ranks)), []
    for replica in range(mesh.replicate):
        for shard in range(shards):
            first = len(lines) * mesh.context * mesh.tensor
            node = f"node {first // per_node}  " if found.ranks.num_nodes > 1 else ""
            copy = f"replicate {replica}  " if mesh.replicate > 1 else ""
            groups = [[f"{next(numbers):{width}}" for _ in range(mesh.tensor)] for _ in range(mesh.context)]
            lines.append(f"{node}{copy}shard {shard:<3} " + " ".join(f"[{' '.join(group)}]" for group in groups))
    legend = "rank numbers" + (", a bracket shares each layer's matrices" if mesh.tensor > 1 else "")
    legend += ", the brackets of a line share each sequence" if mesh.context > 1 else ""
    more = [f"... and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
    return [*lines[:MOST_LINES], *more, f"({legend})"]


def checkpoint_row(found: ResolvedRun) -> dict[str, str]:
    """Disk that checkpoints take: what is trained in float32, and with it AdamW's two moments."""
    config, settings = found.config, found.config.checkpoint
    if not settings.enabled:
        return {"checkpoints": "none (checkpoint.enabled=false)"}
    if config.model.student.lora.is_on:
        return {}
    num_params = sum(map(math.prod, model_files.shapes(found.student.folder).values()))
    size = 4 * num_params * (3 if settings.save_optimizer else 1)
    kept = settings.keep_top_k + 2  # the newest, and the one that is being written
    return {
        "checkpoints": f"{size / 2**30:.3g} GiB each, every {settings.period} steps; up to {kept} of them, "
        f"{kept * size / 2**30:.3g} GiB"
    }


def scores_row(config: Config, steps: int) -> dict[str, str]:
    """Disk that the kept scores take, where every answer is as long as may be."""
    rollout = config.rollout
    if not rollout.save_scores:
        return {}
    tokens = rollout.max_sequence_length if rollout.environment else rollout.max_new_tokens
    size = rollout.prompts_per_step * rollout.generations_per_prompt * tokens * (8 * config.loss.topk + 16)
    return {"scores": f"at most {size / 2**30:.3g} GiB a step, {steps * size / 2**30:.3g} GiB of all"}


def engine_row(found: ResolvedRun, engine: EngineModelConfig) -> str:
    ranks = engine.tensor_parallel
    sleeps = found.ranks.on_gpus and engine.sleep is not False
    each = "1 rank" if ranks == 1 else f"{ranks} ranks that share its matrices"
    return f"{found.ranks.total // ranks}, each of {each}" + (", asleep while others work" if sleeps else "")


def step_rows(found: ResolvedRun) -> dict[str, str]:
    config = found.config
    rollout, train, mesh = config.rollout, config.train, config.mesh
    sequences = rollout.prompts_per_step * rollout.generations_per_prompt
    most_tokens = sequences * rollout.max_sequence_length
    rounds = micro_batches_per_update(config, num_ranks=found.ranks.total)
    how = "packed" if train.packing else "padded"
    shared = f", shared by {mesh.context} context ranks" if mesh.context > 1 else ""
    return {
        "sequences": f"{rollout.prompts_per_step} prompts x {rollout.generations_per_prompt} answers = {sequences}",
        "updates": f"{sequences} / {train.global_batch_size} sequences = {updates_per_step(config)}",
        "tokens": f"at most {most_tokens:,} ({rollout.max_sequence_length:,} a sequence)",
        "micro-batches": f"at most about {rounds} of {train.micro_batch_tokens:,} tokens, {how}{shared}, an update",
    }


def run_rows(found: ResolvedRun) -> dict[str, str]:
    config = found.config
    steps, validations = found.num_steps, num_validations(config, found.num_steps)
    samples = min(config.eval.max_samples, found.num_validation_rows or config.eval.max_samples)
    teacher = ", and the teacher once" if config.eval.teacher else ""
    epoch = "not known: the data is streamed"
    if found.num_recorded_steps is not None:
        epoch = f"{found.num_recorded_steps:,} recorded steps"
    elif found.num_train_rows is not None:
        epoch = f"{found.num_train_rows // config.rollout.prompts_per_step:,} steps"
    return trained_row(found) | {
        "rows": f"{training_rows(found)}, {validation_rows(found)} for validation",
        "epoch": epoch,
        "steps": f"{steps:,} (max_steps {config.train.max_steps:,}, max_epochs {config.train.max_epochs})",
        "validation": f"{validations} times on {samples} prompts{teacher}" if validations else "none",
        **checkpoint_row(found),
        **scores_row(config, steps),
    }


def num_validations(config: Config, steps: int) -> int:
    """How often a run of so many steps validates the student."""
    settings = config.eval
    if not validates(config):
        return 0
    periodic = steps // settings.period if settings.period else 0
    at_end = settings.at_end and not (settings.period and steps % settings.period == 0)
    return settings.at_start + periodic + at_end


def print_pace(job: Job, found: ResolvedRun, pace: Pace) -> None:
    """Prints what was measured, and what it comes to over the run."""
    console = Console(highlight=False)
    console.print(_table("seconds, measured here", pace_rows(found, pace)))
    console.print(_table("expected", expected_rows(found, pace)))


def pace_rows(found: ResolvedRun, pace: Pace) -> dict[str, str]:
    """Each stage of a step, a step, and what comes beside steps."""
    each = ", ".join(f"{seconds:.2f}" for seconds in pace.steps)
    how = f"the median of {each}" if len(pace.steps) > 1 else "of one step"
    rows = {stage: f"{seconds:9.3f}" for stage, seconds in pace.stages.items()}
    rows["a step"] = f"{pace.step:9.3f}, {how}; answers of {pace.mean_length:.0f} tokens"
    rows["start"] = f"{pace.start:9.1f}, once: imports, engines, the look at the first answers"
    if pace.teacher_validation is not None:
        rows["teacher validated"] = f"{pace.teacher_validation:9.2f}, once"
    if pace.validation is not None:
        rows["a validation"] = f"{pace.validation:9.2f}, its recorded answers included"
    if pace.checkpoint is not None:
        rows["a checkpoint"] = f"{pace.checkpoint:9.3f}, in which training stands still; the writing goes on beside it"
    ranks = "1 rank" if found.ranks.total == 1 else f"{found.ranks.total} ranks"
    where = f"{ranks} on {'GPUs' if found.ranks.on_gpus else 'CPUs'} of {platform.node()}"
    return rows | {"from": f"the first steps of this very run, {where}; the first one is left out"}


def expected_rows(found: ResolvedRun, pace: Pace) -> dict[str, str]:
    """How long an epoch and the run will take, if every step is as those that were measured."""
    config, steps, settings = found.config, found.num_steps, found.config.checkpoint
    parts = {
        "start": pace.start + (pace.teacher_validation or 0.0),
        f"{steps:,} steps": steps * pace.step,
        "validations": num_validations(config, steps) * (pace.validation or 0.0),
        "checkpoints": (steps // settings.period if settings.enabled else 0) * (pace.checkpoint or 0.0),
    }
    rows = {}
    if found.num_train_rows is not None:
        epoch = found.num_train_rows // config.rollout.prompts_per_step
        rows["an epoch"] = f"{duration(epoch * pace.step)} for {epoch:,} steps"
    told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.5)
    return rows | {
        "the run": f"{duration(sum(parts.values()))} ({told})",
        "if": "answers stay as long as they are now: sampling and scoring take as long as these are",
    }


def duration(seconds: float) -> str:
    """Hours where there are any: 2.3 h, 4.5 min, 12 s."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def trained_row(found: ResolvedRun) -> dict[str, str]:
    """How much of the student is trained, where it is not all of it."""
    lora = found.config.model.student.lora
    if not lora.is_on:
        return {}
    shapes = model_files.shapes(found.student.folder)
    layers = targeted(shapes, lora.targets)
    own, whole = sum(lora.rank * sum(shape) for shape in layers.values()), sum(map(math.prod, shapes.values()))
    return {
        "trained": f"adapters of rank {lora.rank} on {len(layers)} linear layers: {own:,} parameters beside {whole:,} "
        f"frozen ones, synced {lora.sync.value if lora.sync is LoraSync.merged else 'as an adapter'}"
    }


def memory_rows(found: ResolvedRun) -> dict[str, str]:
    """Return a rank's peak by part, in GiB, or why there is no prediction."""
    predicted, ranks = found.memory, found.ranks
    if predicted is None:
        return {"no prediction": found.no_memory or ""}
    rows = {name: f"{size / 2**30:9.3f}" for name, size in predicted.parts.items()}
    total = hardware.gpu_memory() if ranks.on_gpus else hardware.host_memory()
    if total is None:
        for name, engine in (("sampler", found.config.engine.student), ("scorer", found.config.engine.teacher)):
            if engine.kv_cache_gib is None and name in predicted.parts:
                rows[name] = f"{engine.gpu_memory_utilization:.0%} of a GPU whose size is not known here"
    rows["peak"] = f"{predicted.peak / 2**30:9.3f}, at most, the trainer's in {predicted.moment}"
    if ranks.on_gpus and total:
        rows["of"] = f"{total / 2**30:9.3f}, a GPU"
    elif total:
        rows["of"] = f"{total / ranks.per_node / 2**30:9.3f}, the host's memory over {ranks.per_node} ranks"
    return rows


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", min_width=18)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
