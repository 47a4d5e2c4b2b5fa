"""GPUs as NVML describes them, by a double of the library."""

from types import SimpleNamespace

import pynvml
import pytest

from distill_cli.machine import hardware
from distill_cli.machine.gpus import Gpu, NoDriver, query_gpus


class FakeNvml:
    """pynvml on a machine of three cards, which reports what `missing` does not name; a handle is an index.

    `nvmlInit` fails with `no_driver` if that is given.
    """

    NVMLError = pynvml.NVMLError
    NVML_COMPUTEMODE_EXCLUSIVE_THREAD = pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD
    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS
    UUIDS = ("GPU-aa11-1", "GPU-ab22-2", "GPU-cc33-3")

    def __init__(self, *, missing: tuple[str, ...] = (), no_driver: int | None = None) -> None:
        self.num_open = 0
        self._no_driver = no_driver
        for name in missing:
            setattr(self, name, self._not_supported)

    def nvmlInit(self) -> None:
        if self._no_driver is not None:
            raise pynvml.NVMLError(self._no_driver)
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86.15"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid == "MIG-dd44-4":
            return 7
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.UUIDS[handle]

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=(8 + handle) * 2**30, used=2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=0)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 512_300

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS if handle == 1 else pynvml.NVML_COMPUTEMODE_DEFAULT

    def _not_supported(self, handle: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml()
    first, second, _ = query_gpus(nvml)
    assert first == Gpu(0, "card 0", "570.86.15", 8 * 2**30, 2**30, utilization=0.0, power_w=512.3, is_exclusive=False)
    assert second.is_exclusive
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    ("listed", "indices"),
    [
        ("2,0", [2, 0]),
        ("GPU-ab22-2, 1", [1, 1]),
        ("GPU-c", [2]),  # abbreviated
        ("MIG-dd44-4", [7]),
        ("1,9,0", [1]),  # CUDA stops at a name that is no GPU's
        ("0,GPU-x", [0]),
        ("1,-1,0", [1]),
        ("", []),
    ],
)
def test_visible_gpus_are_chosen(listed: str, indices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert [gpu.index for gpu in query_gpus(FakeNvml())] == indices


def test_unreported_values_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    values = ("MemoryInfo", "UtilizationRates", "PowerUsage", "ComputeMode")
    (gpu,) = query_gpus(FakeNvml(missing=tuple(f"nvmlDeviceGet{value}" for value in values)))
    assert gpu == Gpu(1, "card 1", "570.86.15")


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_says_why(error: int) -> None:
    with pytest.raises(NoDriver, match=r"Not Found|Not Loaded"):
        query_gpus(FakeNvml(no_driver=error))


@pytest.mark.skipif(hardware.visible_gpus() > 0, reason="this machine has a driver")
def test_without_a_gpu_memory_is_unknown() -> None:
    assert hardware.gpu_memory() is None
