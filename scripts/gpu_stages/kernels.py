"""Run the tests marked `gpu` that need no engine: varlen attention, fused head, optimizer offload, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial

from distill_cli.machine.processes import die_with_parent
from gpu_stages.figures import Stage, StageFailed

FOLDERS = ("tests/student", "tests/losses", "tests/machine/test_torch_versions.py")


def run(stage: Stage) -> None:
    report = stage.scratch / "kernels.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", *FOLDERS]
    subprocess.run(command, check=False, preexec_fn=partial(die_with_parent, parent=os.getpid()))
    if not report.exists():
        raise StageFailed("pytest did not start")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(failed)
    stage.record("tests passed", passed, at_least=None if stage.rehearse else 1, wrong_if_missed=True)
    stage.record("tests failed", len(failed), at_most=0, wrong_if_missed=True)
    stage.record("tests skipped", skipped)
    if failed:
        raise StageFailed(f"failed: {', '.join(failed)}")
    if stage.rehearse and not cases:
        raise StageFailed("no test was collected")
