"""Predict a rank's peak, compare it with the device, and find the single keys that make it fit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from distill_cli.config.schema import Checkpointing, Config
from distill_cli.config.variation import override
from distill_cli.memory.engine_bytes import CPU_KV_CACHE_GIB, engine_bytes, engine_problems, engines_of, gib
from distill_cli.memory.shape import ModelShape
from distill_cli.memory.trainer_bytes import Step, trainer_moments
from distill_cli.resolved import PredictedMemory
from distill_cli.types import HiddenSize

CUT_FAMILIES = {"qwen2", "qwen3", "llama", "mistral", "gemma3_text"}
"""Families for which `mesh.tensor` is suggested: others may have no plan, which only transformers knows."""
ROLES = ("student", "teacher")
"""Sections of `engine`."""


@dataclass(frozen=True)
class Device:
    """The memory of the ranks of a node."""

    total: int
    """Bytes of one GPU, or of the host."""
    is_gpu: bool
    num_ranks: int
    """Ranks of the node, which share the host."""


def predict(
    config: Config,
    shape: ModelShape,
    student: Path,
    teachers: Mapping[str, Path],
    *,
    num_ranks: int,
    gpu_bytes: int | None,
    hidden: Sequence[HiddenSize] = (),
) -> PredictedMemory:
    """Return the memory of a rank.

    Args:
        student, teachers: the models' folders, the teachers' by name; none if they have no engines.
        hidden: numbers, and bytes each, of the hidden states of each teacher whose head the trainer has.
        gpu_bytes: memory of the rank's GPU; 0 if it is not known, None on a CPU.

    Raises:
        NoPrediction: the size of an engine's weights is not known.
    """
    engines, asleep = dict[str, int](), list[str]()
    for one in engines_of(config, student, teachers):
        engines[one.name] = engine_bytes(one.folder, one.model, one.settings, gpu_bytes=gpu_bytes)
        if gpu_bytes is not None and one.settings.sleep is not False:
            asleep.append(one.name)
    step = Step.of(config, num_ranks=num_ranks, on_gpu=gpu_bytes is not None, teachers=hidden)
    moments = trainer_moments(shape, step)
    trainer, rest = max(moments, key=lambda moment: moment.total), moments[0].parts
    peak = peak_bytes(trainer.total, rest["weights"] + rest["optimizer"], engines, asleep)
    return PredictedMemory(peak, {**trainer.parts, **engines}, trainer.name, tuple(asleep))


def peak_bytes(trainer: int, resting: int, engines: Mapping[str, int], asleep: Sequence[str]) -> int:
    """Return a rank's peak: in training, or while the engines work and the trainer holds `resting` bytes.

    Args:
        engines: bytes while awake.
        asleep: those that free their memory while the student trains; one of them is awake at a time.
    """
    awake = sum(size for name, size in engines.items() if name not in asleep)
    return max(trainer + awake, resting + awake + max((engines[name] for name in asleep), default=0))


def alternatives(
    config: Config, shape: ModelShape, *, num_ranks: int, gpu_bytes: int | None, excess: int
) -> Iterator[tuple[str, Any]]:
    """Yield each key and value that alone may lower a rank's peak, which is `excess` bytes too large."""
    train, mesh = config.train, config.mesh
    tokens = train.micro_batch_tokens // 2
    while tokens >= config.rollout.max_sequence_length:
        yield "train.micro_batch_tokens", tokens
        tokens //= 2
    modes = [Checkpointing.none, Checkpointing.selective, Checkpointing.full]
    for mode in modes[modes.index(train.activation_checkpointing) + 1 :]:
        yield "train.activation_checkpointing", mode
    cut = (shape.num_heads, shape.num_key_heads, shape.layers[0].mlp, shape.vocab)
    axes: dict[str, tuple[int, ...]] = {} if shape.has_state or mesh.expert > 1 else {"context": ()}
    axes |= {"tensor": cut} if shape.family in CUT_FAMILIES and not train.compile else {}
    axes |= {"expert": (shape.num_experts,)} if shape.num_experts and mesh.tensor == mesh.context == 1 else {}
    for name, widths in axes.items():
        others = mesh.replicate * mesh.tensor * mesh.context * mesh.expert // getattr(mesh, name)
        for size in range(getattr(mesh, name) + 1, num_ranks + 1):
            if num_ranks % (others * size) == 0 and not any(width % size for width in widths):
                yield f"mesh.{name}", size
    if mesh.replicate > 1:
        yield "mesh.replicate", 1
    for role in ROLES:
        engine = getattr(config.engine, role)
        if engine.kv_cache_gib is not None or gpu_bytes is None:
            less = math.floor(1000 * ((engine.kv_cache_gib or CPU_KV_CACHE_GIB) - excess / 2**30)) / 1000
            yield from [(f"engine.{role}.kv_cache_gib", less)] if less > 0 else []
        elif gpu_bytes:
            share = math.floor((engine.gpu_memory_utilization - excess / gpu_bytes) * 100) / 100
            yield from [(f"engine.{role}.gpu_memory_utilization", share)] if share > 0 else []
    if gpu_bytes is not None and not train.cpu_offload and not train.offload_optimizer:
        yield "train.offload_optimizer", True
        yield "train.cpu_offload", True


def problem(
    config: Config,
    shape: ModelShape,
    student: Path,
    teachers: Mapping[str, Path],
    *,
    num_ranks: int,
    device: Device,
    hidden: Sequence[HiddenSize] = (),
) -> str | None:
    """Return one line if a rank's peak does not fit, with the keys that alone make it fit; None if it does.

    The arguments are those of `predict`.

    Raises:
        NoPrediction: the size of an engine's weights is not known.
    """
    gpu_bytes, room = (device.total, device.total) if device.is_gpu else (None, device.total // device.num_ranks)

    def predicted(other: Config) -> PredictedMemory:
        return predict(other, shape, student, teachers, num_ranks=num_ranks, gpu_bytes=gpu_bytes, hidden=hidden)

    now = predicted(config)
    excess = now.peak - room
    if excess <= 0:
        return None
    best: dict[str, tuple[int, str]] = {}
    for key, value in alternatives(config, shape, num_ranks=num_ranks, gpu_bytes=gpu_bytes, excess=excess):
        other = override(config, {key: value})
        peak = predicted(other).peak
        if peak > room or key in best:
            continue
        if gpu_bytes is None or not any(engine_problems(other, student, teachers, gpu_bytes=gpu_bytes)):
            shown = value.value if isinstance(value, Enum) else str(value).lower()
            best[key] = (peak, f"{key}={shown} ({gib(peak)} GiB)")
    place = "its GPU has" if device.is_gpu else f"its share of the host's memory ({device.num_ranks} ranks) is"
    changes = " or ".join(text for _, text in sorted(best.values())[:3])
    fix = f"set {changes}" if changes else "no single key is enough: take a smaller model, more ranks, or several keys"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in now.parts.items() if size)
    return f"memory: a rank needs about {gib(now.peak)} GiB ({parts} GiB), and {place} {gib(room)} GiB; {fix}"
