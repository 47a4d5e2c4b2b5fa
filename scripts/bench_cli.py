"""Measure commands that start no run: wall and CPU seconds, the best of several runs.

    python scripts/bench_cli.py [--repeat 5]

Each command runs in its own process, as from a shell: the interpreter's start and all imports are included. None may
import torch; the script checks that too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

COMMANDS = (
    "--help",
    "ls",
    "ls loss",
    "--cfg job",
    "plan",
    "plan cluster=slurm",
    "plan loss.topk=0",
    "report nothing",
    "doctor",
)
"""`plan cluster=slurm` is refused with one line if Slurm is not installed."""
MAY_IMPORT_TORCH = ("doctor",)
"""Its probes import torch, in processes of their own."""


def measure(command: str, folder: str) -> tuple[float, float, int]:
    """Return wall and CPU seconds of the command with its children, and its exit status."""
    before, begin = os.times(), time.perf_counter()
    argv = [sys.executable, "-m", "distill_cli", *command.split()]
    done = subprocess.run(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    wall, after = time.perf_counter() - begin, os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return wall, cpu, done.returncode


def imports_torch(command: str, folder: str) -> bool:
    code = "import sys; from distill_cli.cli import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, *command.split()]
    return subprocess.run(argv, cwd=folder, capture_output=True, check=False).returncode == 1


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeat", type=int, default=5)
    repeat = arguments.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        print("| command | wall | CPU | status |\n|---|---|---|---|")
        for command in COMMANDS:
            found = [measure(command, folder) for _ in range(repeat)]
            wall, cpu = min(wall for wall, _, _ in found), min(cpu for _, cpu, _ in found)
            print(f"| `distill {command}` | {wall:.2f} s | {cpu:.2f} s | {found[0][2]} |", flush=True)
            if command not in MAY_IMPORT_TORCH and imports_torch(command, folder):
                sys.exit(f"distill {command} imports torch")


if __name__ == "__main__":
    main()
