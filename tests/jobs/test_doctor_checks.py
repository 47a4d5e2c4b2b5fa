"""What `distill doctor` makes of the GPUs; tests/end_to_end/test_command.py has the command itself."""

from dataclasses import replace

from distill_cli.jobs.doctor_checks import gpu_findings
from distill_cli.machine.gpus import Gpu

IDLE = Gpu(0, "NVIDIA H100 80GB HBM3", "570.86.15", 81559 * 2**20, 2**20, 0.0, 70.0, is_exclusive=False)
GPUS = [
    IDLE,
    replace(IDLE, index=1, used_bytes=60000 * 2**20, is_exclusive=True),
    replace(IDLE, index=2, name="NVIDIA A100-SXM4-40GB", memory_bytes=None, used_bytes=None),
]


def test_gpus_are_judged_by_reports() -> None:
    found = {finding.name: finding for finding in gpu_findings(GPUS)}
    assert found["driver"].detail == "NVIDIA 570.86.15"
    assert {name for name, finding in found.items() if not finding.ok} == {"gpu 1", "gpu 1 mode"}
    assert found["gpu 0"].detail == "NVIDIA H100 80GB HBM3, 80 GiB, 100% free"
    assert found["gpu 2"].detail == "NVIDIA A100-SXM4-40GB"
    assert not any(finding.needed for name, finding in found.items() if name != "driver")


def test_no_gpu_no_findings() -> None:
    assert gpu_findings([]) == []
