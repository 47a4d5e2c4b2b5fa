"""What `distill doctor` makes of nvidia-smi's answers; tests/end_to_end/test_command.py has the command itself."""

from distill_cli.verbs.doctor import gpu_findings

SAID = """0, NVIDIA H100 80GB HBM3, 81559, 1, 570.86.15, Default
1, NVIDIA H100 80GB HBM3, 81559, 60000, 570.86.15, Exclusive_Process
2, NVIDIA A100-SXM4-40GB, [N/A], [N/A], 570.86.15, Default
"""


def test_gpus_are_judged_by_what_they_tell() -> None:
    found = {finding.name: finding for finding in gpu_findings(SAID)}
    assert found["driver"].detail == "NVIDIA 570.86.15"
    assert {name for name, finding in found.items() if not finding.ok} == {"gpu 1", "gpu 1 mode"}
    assert found["gpu 0"].detail == "NVIDIA H100 80GB HBM3, 80 GiB, 100% free"
    assert found["gpu 2"].detail == "NVIDIA A100-SXM4-40GB"
    assert not any(finding.needed for name, finding in found.items() if name != "driver")


def test_no_gpu_no_findings() -> None:
    assert gpu_findings("\n") == []
