"""A rank's peak, whether it fits the device, and which key alone would make it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from distill_cli.config.derived import needs_sampler, needs_scorer
from distill_cli.config.schema import Checkpointing, Config
from distill_cli.config.variation import override
from distill_cli.memory.engine_bytes import CPU_KV_CACHE_GIB, engine_bytes, engine_problems, gib
from distill_cli.memory.shape import ModelShape
from distill_cli.memory.trainer_bytes import Moment, Step, trainer_moments


@dataclass(frozen=True)
class Device:
    """What the ranks of a node live on."""

    total: int
    """Bytes: of one GPU, or of the host."""
    is_gpu: bool


@dataclass(frozen=True)
class Prediction:
    """One rank of a run, in bytes."""

    trainer: Moment
    """The moment that holds most."""
    engines: dict[str, int]
    """sampler, scorer: while awake. On a GPU of unknown size without those that take a share of it."""
    resting: int
    """What the trainer holds while the engines work."""
    asleep: tuple[str, ...] = ()
    """The engines that give their memory back while the student trains."""

    @property
    def peak(self) -> int:
        awake = sum(size for name, size in self.engines.items() if name not in self.asleep)
        turns = max((self.engines[name] for name in self.asleep), default=0)  # one of them at a time
        return max(self.trainer.total + awake, self.resting + awake + turns)

    def __str__(self) -> str:
        parts = {**self.trainer.parts, **self.engines}
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size) + " GiB"


def predict(
    config: Config,
    shape: ModelShape,
    student: Path,
    teacher: Path | None,
    *,
    num_ranks: int,
    gpu_bytes: int | None = None,
) -> Prediction:
    """Of a rank on a GPU of `gpu_bytes` (0 where its size is not known), or on a CPU where that is None.

    `teacher` is None where it has no engine. Raises NoPrediction.
    """
    on_gpu = gpu_bytes is not None
    moments = trainer_moments(shape, Step.of(config, num_ranks=num_ranks, on_gpu=on_gpu))
    engines = {}
    if needs_sampler(config):
        engines["sampler"] = engine_bytes(
            student,
            config.model.student.dtype,
            None,
            config.engine.student,
            tensor_parallel=config.engine.student.tensor_parallel,
            gpu_bytes=gpu_bytes,
        )
    if needs_scorer(config):
        engines["scorer"] = engine_bytes(
            teacher,
            config.model.teacher.dtype,
            config.model.teacher.quantization,
            config.engine.teacher,
            tensor_parallel=config.engine.teacher.tensor_parallel,
            gpu_bytes=gpu_bytes,
        )
    before = moments[0].parts
    roles = {"sampler": config.engine.student.sleep, "scorer": config.engine.teacher.sleep}
    asleep = tuple(name for name in engines if gpu_bytes is not None and roles[name] is not False)
    return Prediction(
        asleep=asleep,
        trainer=max(moments, key=lambda moment: moment.total),
        engines=engines,
        resting=before["weights"] + before["optimizer"],
    )


def alternatives(
    config: Config, shape: ModelShape, *, num_ranks: int, gpu_bytes: int | None, excess: int
) -> Iterator[tuple[str, Config]]:
    """Single keys that may lower a rank's peak, as typed, and the config with each."""

    def changed(key: str, value: Any) -> tuple[str, Config]:
        shown = value.value if isinstance(value, Enum) else str(value).lower()
        return f"{key}={shown}", override(config, {key: value})

    tokens = config.train.micro_batch_tokens // 2
    while tokens >= config.rollout.max_sequence_length:
        yield changed("train.micro_batch_tokens", tokens)
        tokens //= 2
    modes = [Checkpointing.none, Checkpointing.selective, Checkpointing.full]
    for mode in modes[modes.index(config.train.activation_checkpointing) + 1 :]:
        yield changed("train.activation_checkpointing", mode)
    mesh = config.mesh
    for name in ("tensor", "context"):
        for size in range(getattr(mesh, name) + 1, num_ranks + 1):
            others = mesh.replicate * mesh.tensor * mesh.context // getattr(mesh, name)
            cut = (shape.num_heads, shape.num_key_heads, shape.mlp, shape.vocab) if name == "tensor" else ()
            refused = name == "tensor" and config.train.compile
            if num_ranks % (others * size) == 0 and not any(number % size for number in cut) and not refused:
                yield changed(f"mesh.{name}", size)
    if mesh.replicate > 1:
        yield changed("mesh.replicate", 1)
    for role in ("student", "teacher"):
        kv_cache = getattr(config.engine, role).kv_cache_gib
        less = math.floor(1000 * ((kv_cache or CPU_KV_CACHE_GIB) - excess / 2**30)) / 1000
        if less > 0 and (kv_cache is not None or gpu_bytes is None):
            yield changed(f"engine.{role}.kv_cache_gib", less)
    if gpu_bytes is None:
        return
    if not config.train.cpu_offload and not config.train.offload_optimizer:
        yield changed("train.offload_optimizer", True)
        yield changed("train.cpu_offload", True)
    for role in ("student", "teacher"):
        engine = getattr(config.engine, role)
        if engine.kv_cache_gib is None and gpu_bytes:
            share = math.floor((engine.gpu_memory_utilization - excess / gpu_bytes) * 100) / 100
            if share > 0:
                yield changed(f"engine.{role}.gpu_memory_utilization", share)


def problem(
    config: Config,
    shape: ModelShape,
    student: Path,
    teacher: Path | None,
    *,
    num_ranks: int,
    ranks_here: int,
    device: Device,
) -> str | None:
    """One line where a rank's peak does not fit, with the keys that alone bring it under; None where it does.

    Raises NoPrediction.
    """
    gpu_bytes = device.total if device.is_gpu else None
    room = device.total if device.is_gpu else device.total // ranks_here

    def predicted(other: Config) -> Prediction:
        return predict(other, shape, student, teacher, num_ranks=num_ranks, gpu_bytes=gpu_bytes)

    now = predicted(config)
    if now.peak <= room:
        return None
    excess = now.peak - room
    best: dict[str, tuple[int, str]] = {}
    for typed, other in alternatives(config, shape, num_ranks=num_ranks, gpu_bytes=gpu_bytes, excess=excess):
        key, peak = typed.split("=")[0], predicted(other).peak
        if peak <= room and key not in best and _engines_fit(other, student, teacher, gpu_bytes):
            best[key] = (peak, f"{typed} ({gib(peak)} GiB)")
    where = "its GPU has" if device.is_gpu else f"its share of the host's memory ({ranks_here} ranks) is"
    turn = " or ".join(text for _, text in sorted(best.values())[:3])
    return f"memory: a rank needs about {gib(now.peak)} GiB ({now}), and {where} {gib(room)} GiB; " + (
        f"set {turn}" if turn else "no single key brings it under: a smaller model, more ranks, or several of them"
    )


def _engines_fit(config: Config, student: Path, teacher: Path | None, gpu_bytes: int | None) -> bool:
    return gpu_bytes is None or not list(engine_problems(config, student, teacher, gpu_bytes=gpu_bytes))
