"""Describe NVIDIA GPUs through the driver's library (NVML, in nvidia-ml-py). No torch."""

import importlib
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


class NoDriver(Exception):
    """NVML cannot be used; the message says why."""


@dataclass(frozen=True)
class Gpu:
    """One visible GPU; None is a value that the card does not report."""

    index: int
    """NVML's, which nvidia-smi shows too."""
    name: str
    driver: str
    memory_bytes: int | None = None
    used_bytes: int | None = None
    """Memory that any process or the driver holds."""
    utilization: float | None = None
    """Percent of the last sample period in which a kernel ran."""
    power_w: float | None = None
    is_exclusive: bool = False
    """Whether its compute mode allows one process at a time."""


def query_gpus(nvml: Any = None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES does not hide, in its order.

    Args:
        nvml: the module pynvml, or a double of it.

    Raises:
        NoDriver: there is no driver, or it does not answer.
    """
    nvml = nvml or importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        try:
            return [_describe(nvml, handle) for handle in _visible_handles(nvml)]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise NoDriver(str(error)) from error


def _describe(nvml: Any, handle: Any) -> Gpu:
    values: dict[str, Any] = {}
    with suppress(nvml.NVMLError):  # most often NVMLError_NotSupported, so in each of these
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        values |= {"memory_bytes": memory.total, "used_bytes": memory.used}
    with suppress(nvml.NVMLError):
        values["utilization"] = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    with suppress(nvml.NVMLError):
        values["power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    with suppress(nvml.NVMLError):
        exclusive = (nvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD, nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)
        values["is_exclusive"] = nvml.nvmlDeviceGetComputeMode(handle) in exclusive
    index, name = nvml.nvmlDeviceGetIndex(handle), nvml.nvmlDeviceGetName(handle)
    return Gpu(index, name, nvml.nvmlSystemGetDriverVersion(), **values)


def _visible_handles(nvml: Any) -> list[Any]:
    """Choose as CUDA does: the list ends at the first name that matches no GPU."""
    present = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return present
    visible = []
    with suppress(IndexError, nvml.NVMLError):
        for name in map(str.strip, listed.split(",")):
            visible.append(present[int(name)] if name.isdecimal() else _by_uuid(nvml, name, present))
    return visible


def _by_uuid(nvml: Any, uuid: str, present: list[Any]) -> Any:
    """Find a GPU by its UUID, which may be abbreviated, or a MIG device, which is not in `present`."""
    matching = [handle for handle in present if uuid and nvml.nvmlDeviceGetUUID(handle).startswith(uuid)]
    return matching[0] if matching else nvml.nvmlDeviceGetHandleByUUID(uuid)
