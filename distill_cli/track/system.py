"""What the machine does meanwhile: system.jsonl, sampled by the process that launched the ranks.

The names are those of MLflow's own system metrics, so that its page of them shows these. Of a run on several nodes it
is the first node's.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from distill_cli.folders.metrics_file import MetricsFile

PERIOD_S = 10.0
QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


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
                file.write(step, sample(network) | (gpus() if self._use_gpus else {}))
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


def gpus() -> dict[str, float]:
    """Of each visible GPU, by nvidia-smi; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_gpus(said)


def parse_gpus(said: str) -> dict[str, float]:
    """Metrics from nvidia-smi's lines; what a card does not tell (`[N/A]`) is left out."""
    found: dict[str, float] = {}
    for line in said.splitlines():
        index, *fields = (field.strip() for field in line.split(","))
        numbers = [float(field) if field.replace(".", "", 1).isdigit() else None for field in fields]
        utilization, used, total, power = numbers
        values = {
            "utilization_percentage": utilization,
            "memory_usage_megabytes": used,
            "memory_usage_percentage": 100 * used / total if used is not None and total else None,
            "power_usage_watts": power,
        }
        found |= {f"system/gpu_{index}_{name}": value for name, value in values.items() if value is not None}
    return found
