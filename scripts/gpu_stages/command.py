"""The command as a user types it, on the device of a stage."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from gpu_stages.figures import Stage, StageFailed

BF16 = ("train.precision=bf16", "model.student.dtype=bfloat16", "model.teacher.dtype=bfloat16")


def arguments(stage: Stage, *argv: str) -> list[str]:
    device = ["cluster.ranks_per_node=1"] if stage.rehearse else ["cluster.gpus_per_node=1"]
    return [sys.executable, "-m", "distill_cli", *argv, "tracker=none", *device]


def start(stage: Stage, *argv: str, verb_only: bool = False) -> subprocess.Popen:
    """`distill ARGV` in the scratch folder; its output is the stage's log and what `finish` returns.

    Args:
        verb_only: the arguments are whole: nothing of the stage's device is added.
    """
    command = [sys.executable, "-m", "distill_cli", *argv] if verb_only else arguments(stage, *argv)
    print("$", " ".join(command[2:]), flush=True)
    return subprocess.Popen(command, cwd=stage.scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """What it printed; raises StageFailed with its last error."""
    output, _ = process.communicate()
    print(output, flush=True)
    if process.returncode:
        errors = [line for line in output.splitlines() if re.match(r"(error|bad) ", line) or line.startswith("error:")]
        lines = errors or output.strip().splitlines()[-1:] or ["no output"]
        raise StageFailed(f"distill ended with status {process.returncode}: {' | '.join(lines)[:400]}")
    return output


def timed(stage: Stage, *argv: str) -> tuple[str, float]:
    """What `distill ARGV` printed, and seconds."""
    begin = time.perf_counter()
    return finish(start(stage, *argv)), time.perf_counter() - begin


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl that are whole."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
