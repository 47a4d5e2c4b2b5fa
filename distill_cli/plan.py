"""`distill plan`: what a run would do, before it does anything.

Memory is by part and by arithmetic; activations are left out, since they depend on lengths.
"""

from __future__ import annotations

import json
import math
import shlex
import struct
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_cli import hardware
from distill_cli.config.checks import inert_overrides
from distill_cli.config.compose import Job, known_losses
from distill_cli.config.derived import updates_per_step
from distill_cli.config.schema import Config, Dtype, EngineModelConfig
from distill_cli.launch.local import command
from distill_cli.preflight import Preflight
from distill_cli.run import single_path
from distill_cli.rundir import RunDir

BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}


def print_plan(job: Job, found: Preflight) -> None:
    """Prints what a checked job would do; starts nothing."""
    config = job.config
    console = Console(highlight=False)
    console.print(_table("mesh", mesh_rows(config)))
    console.print(_table("a step", step_rows(config)))
    console.print(_table("the run", run_rows(config, found)))
    console.print(_table("memory of a rank, GiB", memory_rows(config, found)))
    run = RunDir(single_path(job))
    launch = shlex.join(command(run, num_ranks=hardware.ranks_per_node(config)))
    console.print(_table("launch", {"folder": str(run.path), "command": launch}))
    for warning in [*found.warnings, *inert_overrides(config, job.overrides, known_losses())]:
        console.print(f"warning: {escape(warning)}")


def mesh_rows(config: Config) -> dict[str, str]:
    mesh, ranks, gpus = config.mesh, num_ranks(config), hardware.gpus_per_node(config)
    shards = parameter_shards(config)
    rows = {
        "ranks": f"{ranks} on {'GPUs' if gpus else 'the CPU'}",
        "student's engines": engine_row(config, config.engine.student),
        "teacher's engines": engine_row(config, config.engine.teacher),
        "shard": f"{ranks // (mesh.tensor * mesh.context * mesh.replicate)}: each takes a share of the sequences",
        "replicate": f"{mesh.replicate}: copies of the sharded student",
        "context": f"{mesh.context}: share each sequence",
        "tensor": f"{mesh.tensor}: share each layer's matrices"
        + (", and the tokens between them" if mesh.sequence_parallel else ""),
    }
    rows = {name: text for name, text in rows.items() if name in ("ranks", "shard") or not text.startswith("1:")}
    return rows | {"of a rank": f"1/{shards} of weights, gradients and optimizer"}


def engine_row(config: Config, engine: EngineModelConfig) -> str:
    ranks, gpus = engine.tensor_parallel, hardware.gpus_per_node(config)
    sleeps = gpus and engine.sleep is not False
    each = "1 rank" if ranks == 1 else f"{ranks} ranks that share its matrices"
    return f"{num_ranks(config) // ranks}, each of {each}" + (", asleep while others work" if sleeps else "")


def num_ranks(config: Config) -> int:
    return hardware.ranks_per_node(config) * config.cluster.nodes


def parameter_shards(config: Config) -> int:
    """Into how many parts weights, gradients and optimizer are cut."""
    return num_ranks(config) // config.mesh.replicate


def step_rows(config: Config) -> dict[str, str]:
    rollout, train, mesh = config.rollout, config.train, config.mesh
    sequences = rollout.prompts_per_step * rollout.generations_per_prompt
    most_tokens = sequences * rollout.max_sequence_length
    shares = num_ranks(config) // (mesh.tensor * mesh.context)
    rounds = math.ceil(train.global_batch_size * rollout.max_sequence_length / shares / train.micro_batch_tokens)
    how = "packed" if train.packing else "padded"
    shared = f", shared by {mesh.context} context ranks" if mesh.context > 1 else ""
    return {
        "sequences": f"{rollout.prompts_per_step} prompts x {rollout.generations_per_prompt} answers = {sequences}",
        "updates": f"{sequences} / {train.global_batch_size} sequences = {updates_per_step(config)}",
        "tokens": f"at most {most_tokens:,} ({rollout.max_sequence_length:,} a sequence)",
        "micro-batches": f"at most about {rounds} of {train.micro_batch_tokens:,} tokens, {how}{shared}, an update",
    }


def run_rows(config: Config, found: Preflight) -> dict[str, str]:
    steps_per_epoch = found.num_train // config.rollout.prompts_per_step
    steps = found.num_steps(config)
    validations = sum(
        [
            config.eval.at_start,
            steps // config.eval.period if config.eval.period else 0,
            config.eval.at_end and not (config.eval.period and steps % config.eval.period == 0),
        ]
    )
    samples = min(config.eval.max_samples, found.num_validation)
    return {
        "rows": f"{found.num_train:,} for training, {found.num_validation:,} for validation",
        "epoch": f"{steps_per_epoch:,} steps",
        "steps": f"{steps:,} (max_steps {config.train.max_steps:,}, max_epochs {config.train.max_epochs})",
        "validation": f"{validations} times on {samples} prompts"
        + (", and the teacher once" if config.eval.teacher and validations else ""),
    }


def memory_rows(config: Config, found: Preflight) -> dict[str, str]:
    shards = parameter_shards(config)
    student, teacher = num_parameters(found.student), num_parameters(found.teacher)
    on_cpu = not hardware.gpus_per_node(config)
    parts = {
        "weights": student * 4 / shards,
        "gradients": student * 4 / shards,
        "optimizer": student * 8 / shards,
        "sampler's weights": student * BYTES[config.model.student.dtype] / config.engine.student.tensor_parallel,
        "scorer's weights": teacher * BYTES[config.model.teacher.dtype] / config.engine.teacher.tensor_parallel,
    }
    rows = {name: f"{value / 2**30:9.3f}" for name, value in parts.items()}
    for role, engine in (("sampler", config.engine.student), ("scorer", config.engine.teacher)):
        if engine.kv_cache_gib is not None:
            rows[f"{role}'s KV cache"] = f"{engine.kv_cache_gib:9.3f}"
        elif not on_cpu:
            rows[f"{role}'s KV cache"] = f"what is left of {engine.gpu_memory_utilization:.0%} of the GPU"
    return rows


def num_parameters(folder: Path) -> int:
    """Elements of all tensors in a folder's safetensors files, from their headers."""
    return sum(
        math.prod(tensor["shape"])
        for file in folder.glob("*.safetensors")
        for name, tensor in _header(file).items()
        if name != "__metadata__"
    )


def _header(file: Path) -> dict:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length))


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", min_width=18)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
