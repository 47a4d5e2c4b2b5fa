"""Measure whether a long run's memory grows: resident memory of its processes at the end, relative to step 20.

    python scripts/bench_memory_growth.py [OVERRIDES ...] [--steps 500]

The default run with short answers (8 prompts per step, 16 tokens) and small KV caches, and with everything else that it
does: validation every 20 steps, records, checkpoints, tracking. Once a second the resident memory of the command, of
each rank and of other processes (torchrun) is read from outside; a rank's engines are part of it. Memory at a step is
the median of the samples within the ten steps that end there; *perf/peak_mem_gib* is the metric that a run records
itself, and can only grow.

Print one row per process, and exit with status 1 if a rank grew by 1% or more. The command's own process imports
packages for tracking and the report while it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

SMALL = ("rollout.prompts_per_step=8", "train.global_batch_size=8", "rollout.max_new_tokens=16")
SMALL_EVAL = ("eval.max_samples=32",)
SMALL_CACHES = tuple(f"engine.{role}.kv_cache_gib=0.002" for role in ("student", "teacher"))
"""Else the engines would go on for hundreds of steps to use blocks of their caches for the first time."""
WARM_UP, WINDOW = 20, 10
PERIOD_S = 1.0
LIMIT = 0.01
SMALLEST_MIB = 64
"""Smaller processes, such as Python's resource trackers, are left out."""

Samples = dict[str, list[tuple[float, int]]]
"""Times and resident bytes of each process, by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP + WINDOW:
        parser.error(f"--steps={arguments.steps}: must be at least {WARM_UP + WINDOW}")
    with tempfile.TemporaryDirectory() as folder:
        named = (f"train.max_steps={arguments.steps}", f"run.root={folder}", "run.name=r")
        command = [
            sys.executable,
            "-m",
            "distill_cli",
            *named,
            *SMALL,
            *SMALL_EVAL,
            *SMALL_CACHES,
            *arguments.overrides,
        ]
        with (Path(folder) / "log").open("w+") as log:
            process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            samples = follow(process)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{' '.join(command)}:\n{log.read()[-3000:]}")
        rows = [json.loads(line) for line in (Path(folder) / "r" / "metrics.jsonl").read_text().splitlines()]
    times = {row["step"]: row["time"] for row in rows}
    peaks = {row["step"]: row["perf/peak_mem_gib"] for row in rows if row["step"] > 0}
    steps = (WARM_UP, (WARM_UP + arguments.steps) // 2, arguments.steps)
    print("| process |", *(f"MiB at step {step} |" for step in steps), "growth |\n" + "|---" * (2 + len(steps)) + "|")
    failed = not any(name.startswith("rank") for name in samples)
    for name, found in sorted(samples.items()):
        sizes = [at_step(found, step, times) for step in steps]
        if None not in sizes and max(sizes) >= SMALLEST_MIB:
            print_row(name, sizes)
            failed |= name.startswith("rank") and sizes[-1] / sizes[0] - 1 >= LIMIT
    print_row("perf/peak_mem_gib", [peaks[step] * 1024 for step in steps])
    sys.exit(failed)


def print_row(name: str, sizes: list[float]) -> None:
    print(f"| {name} |", *(f"{size:.1f} |" for size in sizes), f"{sizes[-1] / sizes[0] - 1:+.2%} |")


def follow(process: psutil.Popen) -> Samples:
    """Sample a command's processes until it ends."""
    samples: Samples = {}
    names: dict[psutil.Process, str] = {}
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    name = names.get(one) or names.setdefault(one, name_of(one, process))
                    samples.setdefault(name, []).append((time.time(), one.memory_info().rss))
        time.sleep(PERIOD_S)
    return samples


def name_of(process: psutil.Process, command: psutil.Popen) -> str:
    """Return the name of a process: ranks are children of torchrun's agent, forked from it on CPUs."""
    if process.pid == command.pid:
        return "command"
    parent = process.parent()
    is_ours = any(argument.startswith(("distill_cli.launch", "distill_cli.ranks")) for argument in process.cmdline())
    if not is_ours or parent is None:
        return f"process {process.pid}"
    return f"{'torchrun' if parent.pid == command.pid else 'rank'} ({process.pid})"


def at_step(samples: list[tuple[float, int]], step: int, times: dict[int, float]) -> float | None:
    """Return the median of the samples in the ten steps that end with `step`, in MiB; None if there are none."""
    within = [size / 2**20 for moment, size in samples if times[step - WINDOW] <= moment <= times[step]]
    return median(within) if within else None


if __name__ == "__main__":
    main()
