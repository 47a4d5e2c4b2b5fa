"""Time and profile work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SHOWN_KERNELS = 10


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], *, device: str, rounds: int, warmup: int = 2) -> float:
    """Return the median wall time of `call`, synchronized after each round."""
    seconds = []
    for number in range(warmup + rounds):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        if number >= warmup:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def alternating_seconds(calls: dict[str, Callable[[], object]], *, device: str, rounds: int) -> dict[str, float]:
    """Return the median wall time of each call. They alternate, so that other work on the machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            synchronize(device)
            begin = time.perf_counter()
            call()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def product_flops(device: str, *, size: int) -> float:
    """Return the FLOP/s of a square matrix product of random bfloat16 numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device=device, rounds=10, warmup=3)


def peak_bytes(call: Callable[[], object], *, device: str) -> int:
    """Return the peak of torch's CUDA allocator during `call`, over what was allocated before; 0 on a CPU."""
    if device != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def most_expensive(call: Callable[[], object], *, device: str) -> list[dict[str, Any]]:
    """Return the most expensive kernels of `call` with their share of the kernel time; operators on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, clock))
    total = sum(getattr(event, clock) for event in events) or 1
    return [
        {
            "kernel": event.key[:100],
            "calls": event.count,
            "ms": getattr(event, clock) / 1e3,
            "share": getattr(event, clock) / total,
        }
        for event in events[:SHOWN_KERNELS]
    ]
