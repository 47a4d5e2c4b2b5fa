"""Distill teachers with other tokens into small students, by bytes and by older methods: docs/cross_tokenizer.md.

    python scripts/compare_cross_tokenizer.py [KEY=VALUE ...] [--losses mixed uld gold] [--seeds 42 43 44] [--out DIR]

Prints the accuracy on held-out problems before and after each run. KEY=VALUE are overrides of every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path


def run(folder: Path, name: str, *overrides: str) -> dict[str, float]:
    """Run `distill` and return the accuracies that its outcome has, and the teacher's."""
    command = [sys.executable, "-m", "distill_cli", "model=tiny_other", f"run.name={name}", "tracker=none", *overrides]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["val/accuracy"] for row in rows if "val/accuracy" in row]
    return {"before": accuracies[0], "after": accuracies[-1], "teacher": rows[0]["val/teacher_accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=["mixed", "uld", "gold"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--out", type=Path, help="folder of the runs; a temporary one by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for loss, seed in product(arguments.losses, arguments.seeds):
            found = run(folder, f"{loss}_{seed}", f"loss={loss}", f"train.seed={seed}", *arguments.overrides)
            print(f"loss={loss:<6} seed {seed}", *(f"{key} {value:.1%}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
