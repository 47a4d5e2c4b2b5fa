"""What an engine holds, and whether its share of a GPU has room for its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from distill_cli.config.derived import needs_sampler, needs_scorer
from distill_cli.config.execution_schema import EngineModelConfig
from distill_cli.config.schema import Config, Dtype
from distill_cli.memory.shape import NoPrediction
from distill_cli.models import model_files

DTYPE_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}
QUANTIZED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.5}
"""Bytes to a parameter of a layer that vLLM quantizes while it loads; other methods need a quantized checkpoint."""
CPU_KV_CACHE_GIB = 0.25
"""`engines.settings.CPU_KV_CACHE_BYTES`."""


def engine_bytes(
    folder: Path,
    dtype: Dtype,
    quantization: str | None,
    engine: EngineModelConfig,
    *,
    tensor_parallel: int,
    gpu_bytes: int | None,
) -> int:
    """Of an engine that is awake. Raises NoPrediction."""
    if gpu_bytes is not None and engine.kv_cache_gib is None:
        return round(engine.gpu_memory_utilization * gpu_bytes)
    kv_cache = CPU_KV_CACHE_GIB if engine.kv_cache_gib is None else engine.kv_cache_gib
    weights = engine_weights(folder, dtype, quantization, tensor_parallel=tensor_parallel)
    return weights + round(kv_cache * 2**30)


def engine_weights(folder: Path, dtype: Dtype, quantization: str | None, *, tensor_parallel: int) -> int:
    """Bytes of an engine's weights: those of the files where they are quantized. Raises NoPrediction."""
    tensors = model_files.tensors(folder)
    if "quantization_config" in model_files.read_config(folder):
        sizes = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
        unknown = {dtype for dtype, _ in tensors.values()} - sizes.keys()
        if unknown:
            raise NoPrediction(f"its files have tensors of type {', '.join(sorted(unknown))}")
        return round(sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values()) / tensor_parallel)
    if quantization is not None and quantization not in QUANTIZED_BYTES:
        raise NoPrediction(f"how small {quantization} makes its weights is not known")
    plain = DTYPE_BYTES[dtype]
    in_layers = QUANTIZED_BYTES.get(quantization, plain)
    total = sum(
        math.prod(shape) * (in_layers if ".layers." in name and len(shape) == 2 else plain)
        for name, (_, shape) in tensors.items()
    )
    return round(total / tensor_parallel)


def engine_problems(config: Config, student: Path, teacher: Path | None, *, gpu_bytes: int) -> Iterator[str]:
    """One line for each engine whose weights alone pass its share of the GPU. Raises NoPrediction."""
    for role, folder, model, engine, is_needed in (
        ("student", student, config.model.student, config.engine.student, needs_sampler(config)),
        ("teacher", teacher, config.model.teacher, config.engine.teacher, needs_scorer(config)),
    ):
        if engine.kv_cache_gib is not None or not is_needed:
            continue
        weights = engine_weights(
            folder, model.dtype, getattr(model, "quantization", None), tensor_parallel=engine.tensor_parallel
        )
        if weights >= engine.gpu_memory_utilization * gpu_bytes:
            yield (
                f"engine.{role}.gpu_memory_utilization={engine.gpu_memory_utilization}: the engine's weights are "
                f"{gib(weights)} GiB, and that share of the GPU is {gib(engine.gpu_memory_utilization * gpu_bytes)} "
                f"GiB; raise it above {math.ceil(100 * weights / gpu_bytes) / 100}"
            )


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.2f}"
