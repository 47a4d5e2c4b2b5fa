"""Memory of an engine, and whether its share of a GPU holds its weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from distill_cli.config.derived import needs_sampler, needs_scorer, num_sampling_ranks, scoring_ranks
from distill_cli.config.execution_schema import EngineModelConfig
from distill_cli.config.schema import Config, Dtype, StudentModel, TeacherModel
from distill_cli.config.teachers import ONLY, engine_key, teacher_configs
from distill_cli.memory.shape import NoPrediction
from distill_cli.models import model_files
from distill_cli.models.traits import Traits

DTYPE_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}
QUANTIZED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.5}
"""Bytes per parameter of a layer that vLLM quantizes while it loads; other methods need a quantized checkpoint."""
FILE_BYTES = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
"""Bytes per element of the types in safetensors files."""
CPU_KV_CACHE_GIB = 0.25
"""`engines.settings.CPU_KV_CACHE_BYTES`."""

Model = StudentModel | TeacherModel


@dataclass(frozen=True)
class Engine:
    """An engine that a run starts."""

    name: str
    """In tables: sampler, scorer, or `scorer <teacher>` if there are several."""
    key: str
    """The section of its settings."""
    folder: Path
    model: Model
    settings: EngineModelConfig


def engines_of(config: Config, student: Path, teachers: Mapping[str, Path]) -> Iterator[Engine]:
    """Yield the engines that a run starts.

    Args:
        teachers: their folders by name; not read if none has an engine.
    """
    if needs_sampler(config) and not num_sampling_ranks(config):  # else it is on ranks of its own
        yield Engine("sampler", "engine.student", student, config.model.student, config.engine.student)
    if needs_scorer(config):
        for name, one in teacher_configs(config).items():
            if not one.model.teacher.has_engine or scoring_ranks(config)[name]:
                continue
            shown = "scorer" if name == ONLY else f"scorer {name}"
            yield Engine(shown, engine_key(name), teachers[name], one.model.teacher, one.engine.teacher)


def engine_bytes(folder: Path, model: Model, engine: EngineModelConfig, *, gpu_bytes: int | None) -> int:
    """Return the bytes of an engine while awake, on each of its ranks; `gpu_bytes` is None on a CPU.

    Raises:
        NoPrediction: the size of its weights is not known.
    """
    if gpu_bytes is not None and engine.kv_cache_gib is None:
        return round(engine.gpu_memory_utilization * gpu_bytes)
    kv_cache = CPU_KV_CACHE_GIB if engine.kv_cache_gib is None else engine.kv_cache_gib
    return engine_weights(folder, model, tensor_parallel=engine.tensor_parallel) + round(kv_cache * 2**30)


def engine_weights(folder: Path, model: Model, *, tensor_parallel: int) -> int:
    """Return the bytes of an engine's weights on each of its ranks: those of the files if they are quantized.

    Raises:
        NoPrediction: the bytes of an element are not known.
    """
    elements, quantization = model_files.elements(folder), getattr(model, "quantization", None)
    if Traits.read(folder).quantization is not None:
        if unknown := {dtype for dtype, _ in elements} - FILE_BYTES.keys():
            raise NoPrediction(f"its files have tensors of type {', '.join(sorted(unknown))}")
        return round(sum(FILE_BYTES[dtype] * number for (dtype, _), number in elements.items()) / tensor_parallel)
    if quantization is not None and quantization not in QUANTIZED_BYTES:
        raise NoPrediction(f"the size of weights quantized by {quantization} is not known")
    plain = DTYPE_BYTES[model.dtype]
    in_layers = plain if quantization is None else QUANTIZED_BYTES[quantization]
    total = sum(number * (in_layers if is_matrix else plain) for (_, is_matrix), number in elements.items())
    return round(total / tensor_parallel)


def engine_problems(config: Config, student: Path, teachers: Mapping[str, Path], *, gpu_bytes: int) -> Iterator[str]:
    """Yield one line for each engine whose weights alone exceed its share of the GPU. Raises NoPrediction."""
    for one in engines_of(config, student, teachers):
        if one.settings.kv_cache_gib is not None:
            continue
        weights = engine_weights(one.folder, one.model, tensor_parallel=one.settings.tensor_parallel)
        share = one.settings.gpu_memory_utilization
        if weights >= share * gpu_bytes:
            rule = f"the engine's weights are {gib(weights)} GiB, and its share {gib(share * gpu_bytes)} GiB"
            least = math.ceil(100 * weights / gpu_bytes) / 100
            yield f"{one.key}.gpu_memory_utilization={share}: {rule}; raise it above {least}"


def gib(size: float) -> str:
    """Return bytes as GiB, without the unit."""
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.2f}"
