"""What the machine does meanwhile: system.jsonl, sampled by the process that launched the ranks.

The names are those of MLflow's own system metrics, so that its page of them shows these. Of a run on several nodes it
is the first node's.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.machine.gpus import Gpu, NoDriver, query_gpus

PERIOD_S = 10.0


class SystemSampler:
    """A thread that appends a row every `period_s` seconds; costs a few milliseconds each."""

    def __init__(self, path: Path, *, use_gpus: bool, period_s: float = PERIOD_S) -> None:
        self._path, self._use_gpus, self._period_s = path, use_gpus, period_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after a last row."""
        self._closing.set()
        self._thread.join(2.0)

    def _loop(self) -> None:
        psutil.cpu_percent()  # from here to the next call
        network = psutil.net_io_counters()
        with suppress(OSError), MetricsFile(self._path) as file:
            step, is_last = next_step(self._path), False
            while not is_last:
                is_last = self._closing.wait(self._period_s)
                file.write(step, sample(network) | (sample_gpus() if self._use_gpus else {}))
                step += 1


def next_step(path: Path) -> int:
    """The number of the next row: an attempt goes on counting where the one before left off."""
    lines = path.read_text().splitlines() if path.exists() else []
    return 1 + json.loads(lines[-1])["step"] if lines else 0


def sample(network_before) -> dict[str, float]:
    """The host's: CPU since the last call, memory, disk, and what went over the network since `network_before`."""
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": psutil.disk_usage(os.getcwd()).percent,
        "system/network_receive_megabytes": (network.bytes_recv - network_before.bytes_recv) / 1e6,
        "system/network_transmit_megabytes": (network.bytes_sent - network_before.bytes_sent) / 1e6,
    }


def sample_gpus() -> dict[str, float]:
    """The visible GPUs'; empty without a driver."""
    try:
        return gpu_metrics(query_gpus())
    except NoDriver:
        return {}


def gpu_metrics(gpus: Sequence[Gpu]) -> dict[str, float]:
    """Name each value as MLflow does; leave out what a card does not report."""
    found: dict[str, float] = {}
    for gpu in gpus:
        used, total = gpu.used_bytes, gpu.memory_bytes
        values = {
            "utilization_percentage": gpu.utilization,
            "memory_usage_megabytes": None if used is None else used / 1e6,
            "memory_usage_percentage": 100 * used / total if used is not None and total else None,
            "power_usage_watts": gpu.power_w,
        }
        found |= {f"system/gpu_{gpu.index}_{name}": value for name, value in values.items() if value is not None}
    return found
