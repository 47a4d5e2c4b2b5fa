"""Names of the machine's metrics, and values that a GPU does not report."""

from distill_cli.machine.gpus import Gpu
from distill_cli.track.system import gpu_metrics


def test_unreported_gpu_values_are_omitted() -> None:
    gpus = [
        Gpu(0, "H100", "570", 80_000_000_000, 40_000_000_000, utilization=93.0, power_w=512.3),
        Gpu(1, "H100", "570", 80_000_000_000, 0),
    ]
    assert gpu_metrics(gpus) == {
        "system/gpu_0_utilization_percentage": 93, "system/gpu_0_memory_usage_megabytes": 40_000,
        "system/gpu_0_memory_usage_percentage": 50, "system/gpu_0_power_usage_watts": 512.3,
        "system/gpu_1_memory_usage_megabytes": 0, "system/gpu_1_memory_usage_percentage": 0,
    }  # fmt: skip
