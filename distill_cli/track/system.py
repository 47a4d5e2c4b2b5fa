"""Sample the machine's load during a run into system.jsonl.

The names are those of MLflow's own system metrics, so that its page shows them. A run on several nodes records the
first node.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from distill_cli.folders.metrics_file import MetricsFile, read_metrics
from distill_cli.machine.gpus import Gpu, NoDriver, query_gpus


class SystemSampler:
    """A thread that appends a row every `period_s` seconds; each takes a few milliseconds."""

    def __init__(self, path: Path, *, use_gpus: bool, period_s: float = 10.0) -> None:
        self._path, self._use_gpus, self._period_s = path, use_gpus, period_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after a last row."""
        self._closing.set()
        self._thread.join(2.0)

    def _loop(self) -> None:
        psutil.cpu_percent()  # the next call measures from here
        network = psutil.net_io_counters()
        with suppress(OSError), closing(MetricsFile(self._path)) as file:
            step, is_last = max((int(row["step"]) for row in read_metrics(self._path)), default=-1), False
            while not is_last:
                is_last, step = self._closing.wait(self._period_s), step + 1
                row = sample(network)
                with suppress(NoDriver):
                    row |= gpu_metrics(query_gpus() if self._use_gpus else [])
                file.write(step, row)


def sample(network_before: Any) -> dict[str, float]:
    """Return the host's load: CPU since the last call, memory, disk, and network since `network_before`."""
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": psutil.disk_usage(os.getcwd()).percent,
        "system/network_receive_megabytes": (network.bytes_recv - network_before.bytes_recv) / 1e6,
        "system/network_transmit_megabytes": (network.bytes_sent - network_before.bytes_sent) / 1e6,
    }


def gpu_metrics(gpus: Sequence[Gpu]) -> dict[str, float]:
    """Return the GPUs' load, each value named as MLflow names it; omit what a card does not report."""
    found: dict[str, float | None] = {}
    for gpu in gpus:
        used, total, at = gpu.used_bytes, gpu.memory_bytes, f"system/gpu_{gpu.index}"
        found[f"{at}_utilization_percentage"] = gpu.utilization
        found[f"{at}_memory_usage_megabytes"] = None if used is None else used / 1e6
        found[f"{at}_memory_usage_percentage"] = 100 * used / total if used is not None and total else None
        found[f"{at}_power_usage_watts"] = gpu.power_w
    return {name: value for name, value in found.items() if value is not None}
