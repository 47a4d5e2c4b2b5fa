"""Measure the default run from the command line: time to the first step and to the end, accuracy, overhead.

    python scripts/bench_run.py [OVERRIDES ...] [--seeds 42 43 44]

Print one row per seed: seconds from the command to the start of the first training step and to the end, accuracy of the
student before and after and of the teacher, the student's accuracy relative to the teacher's, and the share of a step
(median over steps) that is not sync, sample, score or train.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("time/sync_s", "time/sample_s", "time/score_s", "time/train_s")


def measure(seed: int, overrides: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        command = [sys.executable, "-m", "distill_cli", f"train.seed={seed}", f"run.root={folder}/runs", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        end = time.time()
        run = (Path(folder) / "runs" / "latest").resolve()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        outcome = json.loads((run / "outcome.json").read_text())
    steps = [row for row in rows if row["step"] > 0]
    after, teacher = outcome["after"]["accuracy"], outcome["teacher"]["accuracy"]
    first = steps[0]
    return {
        "seed": seed,
        "to first step, s": first["time"] - first["time/step_s"] - begin,
        "to end, s": end - begin,
        "before": outcome["before"]["accuracy"],
        "after": after,
        "teacher": teacher,
        "after/teacher": after / teacher,
        "step, s": statistics.median(row["time/step_s"] for row in steps),
        "overhead": statistics.median(1 - sum(row[s] for s in STAGES) / row["time/step_s"] for row in steps),
        "worst mismatch": max(row["rollout/engine_mismatch"] for row in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    for number, seed in enumerate(arguments.seeds):
        row = measure(seed, arguments.overrides)
        if number == 0:
            print("  ".join(row))
        print("  ".join(f"{value:>{len(name)}.3g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
