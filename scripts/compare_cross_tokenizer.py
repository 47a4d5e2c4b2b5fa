"""Distill teachers with other tokens into small students, by bytes and by older methods: docs/cross_tokenizer.md.

    python scripts/compare_cross_tokenizer.py [--seeds 42 43 44] [--out FOLDER]

Prints the accuracy on held-out problems before and after each run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ("mixed", "uld", "gold")


def run(folder: Path, name: str, *overrides: str) -> dict[str, float]:
    """Run `distill` and return the accuracies that its outcome has, and the teacher's."""
    command = [sys.executable, "-m", "distill_cli", "model=tiny_other", f"run.name={name}", "tracker=none", *overrides]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["val/accuracy"] for row in rows if "val/accuracy" in row]
    return {"before": accuracies[0], "after": accuracies[-1], "teacher": rows[0]["val/teacher_accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--out", type=Path, help="folder of the runs; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for method in METHODS:
            for seed in arguments.seeds:
                found = run(folder, f"{method}_{seed}", f"loss={method}", f"train.seed={seed}")
                print(
                    f"loss={method:<6} seed {seed}", *(f"{key} {value:.1%}" for key, value in found.items()), flush=True
                )


if __name__ == "__main__":
    main()
