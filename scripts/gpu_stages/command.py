"""Run the `distill` command on a stage's device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distill_cli.machine.processes import die_with_parent
from gpu_stages.figures import Stage, StageFailed

BF16 = ("train.precision=bf16", "model.student.dtype=bfloat16", "model.teacher.dtype=bfloat16")


def arguments(stage: Stage, *argv: str) -> list[str]:
    device = ["cluster.ranks_per_node=1"] if stage.rehearse else ["cluster.gpus_per_node=1"]
    return [sys.executable, "-m", "distill_cli", *argv, "tracker=none", *device]


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen
    output: Path
    """A file instead of a pipe: an unread pipe blocks the writer, and a file keeps the output of a killed process."""


def start(stage: Stage, *argv: str, verb_only: bool = False) -> Started:
    """Start `distill ARGV` in the scratch folder. It is killed when this process ends.

    Args:
        verb_only: add no arguments for the stage's device.
    """
    command = [sys.executable, "-m", "distill_cli", *argv] if verb_only else arguments(stage, *argv)
    print("$", " ".join(command[2:]), flush=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{argv[0].partition('=')[0]}_", suffix=".out", dir=stage.scratch)
    with open(descriptor, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=stage.scratch,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=partial(die_with_parent, parent=os.getpid()),
        )
    return Started(process, Path(name))


def finish(started: Started) -> str:
    """Wait for the command and return its output; raise StageFailed with its errors if it failed."""
    started.process.wait()
    output = started.output.read_text(errors="replace")
    print(output, flush=True)
    if started.process.returncode:
        errors = [line for line in output.splitlines() if re.match(r"error:|bad\s", line)]
        lines = errors or output.strip().splitlines()[-1:] or ["no output"]
        raise StageFailed(f"distill ended with status {started.process.returncode}: {' | '.join(lines)[:400]}")
    return output


def timed(stage: Stage, *argv: str) -> tuple[str, float]:
    """Run `distill ARGV`; return its output and seconds."""
    begin = time.perf_counter()
    return finish(start(stage, *argv)), time.perf_counter() - begin


def metrics(run: Path) -> list[dict]:
    """Return the complete rows of a run's metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
