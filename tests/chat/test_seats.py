"""Where engines are, and what fits."""

from dataclasses import replace

import pytest

from distill_cli.chat.engine_settings import EnginePlan, cpu_problems, gpu_problems
from distill_cli.chat.seats import Seat, seats
from distill_cli.engines.settings import EngineSettings

GIB = 2**30


@pytest.mark.parametrize(
    ("sizes", "num_gpus", "expected"),
    [
        ([1], 1, [Seat(0, 1)]),
        ([1, 1], 1, [Seat(0, 2), Seat(0, 2)]),
        ([1, 1], 8, [Seat(0, 1), Seat(1, 1)]),
        ([1, 1, 4], 8, [Seat(0, 1), Seat(1, 1), Seat(2, 1)]),
        ([1, 4], 4, [Seat(0, 2), Seat(0, 2)]),
        ([1, 2, 2], 4, [Seat(0, 1), Seat(1, 2), Seat(2, 2)]),
        ([1, 8], 2, [Seat(0, 2), Seat(0, 2)]),
        ([1, 1, 1], 0, [Seat(0, 3)] * 3),
    ],
)
def test_engines_share_as_few_gpus_as_possible(sizes: list[int], num_gpus: int, expected: list[Seat]) -> None:
    assert seats(sizes, num_gpus=num_gpus) == expected


def plan(name: str, *, weights: int | None, share: float = 0.45, kv_cache: int | None = None) -> EnginePlan:
    settings = EngineSettings(path="", max_model_len=1, gpu_memory_utilization=share, kv_cache_bytes=kv_cache)
    return EnginePlan(name, "engine.student", settings, Seat(0, 2), weights)


def test_weights_must_fit_their_share() -> None:
    small, large = plan("small", weights=30 * GIB), plan("large", weights=40 * GIB)
    (problem,) = gpu_problems([small, large, plan("unknown", weights=None)], 80 * GIB)
    assert problem.startswith(
        "large: its weights take 40.0 GiB, and its share of a GPU is 36.0 GiB (2 engines share it)"
    )
    alone = replace(large, settings=replace(large.settings, gpu_memory_utilization=0.9), seat=Seat())
    assert list(gpu_problems([alone], 80 * GIB)) == []


def test_engines_must_fit_the_machine() -> None:
    plans = [plan("a", weights=4 * GIB, kv_cache=GIB), plan("b", weights=8 * GIB, kv_cache=GIB)]
    (problem,) = cpu_problems(plans, 14 * GIB)
    assert problem.startswith("engines of 14.0 GiB (a 5.0, b 9.0) do not fit into the 14.0 GiB of this machine")
    assert list(cpu_problems(plans, 15 * GIB)) == []
