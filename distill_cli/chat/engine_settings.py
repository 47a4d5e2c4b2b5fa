"""The settings of a chat's engines: each holds a conversation, and has its share of a device. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_cli.chat.seats import Seat, seats
from distill_cli.chat.setup import Pair, Setup
from distill_cli.config.schema import Config
from distill_cli.config.teachers import engine_key, teacher_configs
from distill_cli.engines.from_config import settings_of
from distill_cli.engines.settings import EngineSettings
from distill_cli.jobs.engine_setup import cpu_kv_cache
from distill_cli.machine import hardware
from distill_cli.memory import NoPrediction, engine_weights, gib
from distill_cli.models.model_files import ModelFiles
from distill_cli.resolved import Ranks

GPU_SHARE = 0.9
"""Share of a GPU that the engines on it take together."""


@dataclass(frozen=True)
class EnginePlan:
    """An engine before it is started."""

    name: str
    key: str
    """The section of its settings."""
    settings: EngineSettings
    seat: Seat
    weights: int | None
    """Bytes on each of its ranks; None if they cannot be predicted."""


def plan_models(setup: Setup) -> list[EnginePlan]:
    """Return the plans of the engines of the models that answer."""
    return [
        plan(
            setup,
            name=model.name,
            key=model.engine_key,
            config=model.resolved.config,
            role=model.role,
            files=model.resolved.student,
            seat=seat,
            length=model.context,
            limit=model.resolved.vocabulary.limit,
        )
        for model, seat in zip(setup.models, places_of(setup), strict=False)
    ]


def plan_teacher(setup: Setup, pair: Pair) -> EnginePlan:
    """Return the plan of the engine of a teacher that has one of its own."""
    assert setup.teacher is not None
    return plan(
        setup,
        name=setup.teacher,
        key=engine_key(setup.teacher),
        config=pair.alone.config,
        role="teacher",
        files=pair.alone.model("teacher"),
        seat=places_of(setup)[-1],
        length=pair.teacher_length,
        limit=pair.alone.vocabulary.limit,
    )


def plan(
    setup: Setup,
    *,
    name: str,
    key: str,
    config: Config,
    role: str,
    files: ModelFiles,
    seat: Seat,
    length: int,
    limit: int | None,
) -> EnginePlan:
    """Return the plan of an engine with the settings of `model.<role>` and `engine.<role>`.

    Args:
        key: the section where these settings were typed.
        length: tokens of the longest sequence.
        limit: see `EngineSettings.vocab_size`.
    """
    settings = settings_of(config, role, folder=files.folder, max_model_len=length, vocab_size=limit, sleep_mode=False)
    model, changed = getattr(config.model, role), dict[str, Any](adapter=None)
    if f"{key}.gpu_memory_utilization" not in setup.typed:
        changed["gpu_memory_utilization"] = math.floor(1000 * GPU_SHARE / seat.num_sharing) / 1000
    if f"{key}.kv_cache_gib" not in setup.typed:
        on_gpus = setup.models[0].resolved.ranks.on_gpus
        changed["kv_cache_bytes"] = None if on_gpus else cpu_kv_cache(files, dtype=model.dtype, length=length)
    try:
        weights = engine_weights(files.folder, model, tensor_parallel=settings.tensor_parallel)
    except NoPrediction:
        weights = None
    return EnginePlan(name, key, replace(settings, **changed), seat, weights)


def places_of(setup: Setup) -> list[Seat]:
    """Return the seats of the models' engines and, if the teacher may get an engine of its own, its seat."""
    engines = [getattr(one.resolved.config.engine, one.role) for one in setup.models]
    if setup.has_teacher_engine:
        assert setup.teacher is not None
        engines.append(teacher_configs(setup.config)[setup.teacher].engine.teacher)
    ranks = setup.models[0].resolved.ranks
    return seats([engine.tensor_parallel for engine in engines], num_gpus=ranks.per_node if ranks.on_gpus else 0)


def memory_problems(plans: Sequence[EnginePlan], ranks: Ranks) -> Iterator[str]:
    """Yield why the device cannot hold these engines at once, as far as that is known."""
    total = hardware.gpu_memory() if ranks.on_gpus else hardware.host_memory()
    yield from gpu_problems(plans, total) if ranks.on_gpus and total else []
    yield from cpu_problems(plans, total) if not ranks.on_gpus and total else []


def gpu_problems(plans: Sequence[EnginePlan], total: int) -> Iterator[str]:
    """Yield one line for each engine whose weights exceed its share of a GPU of `total` bytes."""
    for one in plans:
        share = one.settings.gpu_memory_utilization * total
        if one.weights is not None and one.settings.kv_cache_bytes is None and one.weights >= share:
            what = f"its weights take {gib(one.weights)} GiB, and its share of a GPU is {gib(share)} GiB"
            others = f" ({one.seat.num_sharing} engines share it)" if one.seat.num_sharing > 1 else ""
            fix = f"raise {one.key}.tensor_parallel, use more GPUs, or serve a teacher elsewhere (distill serve)"
            yield f"{one.name}: {what}{others}; {fix}"


def cpu_problems(plans: Sequence[EnginePlan], total: int) -> Iterator[str]:
    """Yield a problem if the engines exceed the `total` bytes of the machine's memory."""
    sizes = [(one.weights or 0) + (one.settings.kv_cache_bytes or 0) for one in plans]
    if sum(sizes) * plans[0].settings.tensor_parallel >= total:
        parts = ", ".join(f"{one.name} {gib(size)}" for one, size in zip(plans, sizes, strict=True))
        fix = f"lower {plans[-1].key}.kv_cache_gib or .max_model_len, or give smaller models"
        yield f"engines of {gib(sum(sizes))} GiB ({parts}) do not fit into the {gib(total)} GiB of this machine; {fix}"
