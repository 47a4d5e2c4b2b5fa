"""Record the numbers of short runs of every kind, bit for bit, to show that a refactoring does not change them.

    python scripts/record_numbers.py --out numbers.json           # in a checkout of the commit to compare with
    python scripts/record_numbers.py --compare numbers.json       # in a checkout of the commit to check

Losses, sampled tokens, the teacher's scores and the trained parameters of a default run, adapters, two ranks, a resumed
run, a replay and a sweep. Bits depend on the processor's instructions and on torch: compare on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SMALL = ("rollout.prompts_per_step=16", "train.global_batch_size=8", "rollout.save_scores=true", "tracker=none")
UNMEASURED = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0")
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "default": (("train.max_steps=3", "eval.max_samples=32", "rollout.save_scores=true", "cluster.ranks_per_node=1"),),
    "lora": ((*SMALL, *UNMEASURED, "train.max_steps=2", "model.student.lora.rank=8"),),
    "two_ranks": ((*SMALL, *UNMEASURED, "train.max_steps=2", "cluster.ranks_per_node=2", "loss=jsd"),),
    "resume": (
        (*SMALL, *UNMEASURED, "train.max_steps=2", "loss=reverse", "loss.tail=renormalize"),
        ("resume", "runs/resume", "train.max_steps=3"),
    ),
    "replay": (("replay", "runs/default", "loss=skew_forward", "tracker=none"),),
    "sweep": (("-m", "loss.topk=8,16", *SMALL, *UNMEASURED, "train.max_steps=1"),),
}
"""Command lines, by the name of the run that they produce."""
MEASURED = ("train/", "rollout/", "val/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers here")
    parser.add_argument("--compare", type=Path, help="exit with status 1 if they differ from those in this file")
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: numbers(Path(folder), name) for name in arguments.only}
    if arguments.out:
        arguments.out.write_text(json.dumps({"processor": processor(), "runs": found}, indent=1) + "\n")
    if arguments.compare:
        recorded = json.loads(arguments.compare.read_text())["runs"]
        different = list(differences({name: recorded[name] for name in found}, found))
        print("\n".join(different) or f"{', '.join(found)}: bit for bit the same")
        return 1 if different else 0
    return 0


def numbers(folder: Path, name: str) -> dict[str, Any]:
    """Run the commands of `name` in `folder`; return the numbers of each resulting run folder."""
    if name == "replay" and not (folder / "runs/default").exists():
        numbers(folder, "default")
    for argv in COMMANDS[name]:
        named = argv if argv[0] == "resume" else (*argv, f"run.name={name}")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "distill_cli", *named], cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"distill {' '.join(named)}:\n{done.stdout}\n{done.stderr}")
    metrics = sorted((folder / "runs" / name).rglob("metrics.jsonl"))
    return {str(file.parent.relative_to(folder / "runs")): computed(file.parent) for file in metrics}


def computed(run: Path) -> dict[str, Any]:
    """Return the numbers in a run's folder: metrics by step, and a digest of each tensor file."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = [*sorted((run / "scores").glob("step_*/*.safetensors")), *sorted((run / "student").glob("*.safetensors"))]
    return {
        "metrics": {str(row["step"]): {k: v for k, v in row.items() if k.startswith(MEASURED)} for row in rows},
        "tensors": {str(file.relative_to(run)): digest(file) for file in files},
    }


def digest(file: Path) -> str:
    """Return the SHA-256 of a safetensors file's names, shapes and bytes, independent of their order in the file."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def processor() -> str:
    """Return what the bits depend on in addition to the code: processor vendor, instruction set, torch version."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    maker = next((line.split()[-1] for line in cpus if line.startswith("vendor_id")), "unknown")
    return f"{maker}-{torch.backends.cpu.get_cpu_capability()}-torch{torch.__version__.partition('+')[0]}"


def differences(recorded: Any, found: Any, at: str = "") -> list[str]:
    """Return one line for each value that differs; a key that only one side has is a difference."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = [*recorded, *(key for key in found if key not in recorded)]
        return [line for key in keys for line in differences(recorded.get(key), found.get(key), f"{at}/{key}")]
    return [] if recorded == found else [f"{at}: {recorded} was recorded, {found} was found"]


if __name__ == "__main__":
    sys.exit(main())
