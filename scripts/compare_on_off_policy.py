"""Draw on-policy and off-policy distillation of the tiny pair over the same number of training tokens.

    python scripts/compare_on_off_policy.py docs/on_off_policy.svg [--root runs/on_off_policy] [--seeds 42 43 44]

Run the command once per seed and kind of answers (the student's own, the teacher's, the dataset's), except runs that
have finished before. Left: accuracy on held-out prompts. Right: KL(student || teacher) at the tokens that the student
samples for held-out prompts, whichever answers it was trained on. Both over the response tokens trained on. Print one
row per run. Needs matplotlib (in the dev group).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
# The same runs give the same file, and its text stays text.
matplotlib.rcParams |= {"svg.hashsalt": "distill", "svg.fonttype": "none"}

import matplotlib.pyplot as plt
import numpy
import pyarrow.parquet
from matplotlib.axes import Axes

KINDS = {
    "own": ("the student's own answers", "#2a6fdb", ("rollout.on_policy_fraction=1",)),
    "teacher": ("the teacher's answers", "#d9722a", ("rollout.on_policy_fraction=0", "rollout.off_policy=teacher")),
    "dataset": ("the dataset's answers", "#444444", ("rollout.on_policy_fraction=0", "rollout.off_policy=dataset")),
}
"""Name -> label, colour, overrides."""
SHARED = ("train.max_steps=40", "eval.period=4", "eval.record_samples=64", "checkpoint.enabled=false", "tracker=none")


@dataclass(frozen=True)
class Curve:
    """The validations of one run."""

    tokens: list[int]
    """Response tokens that the student had learned from."""
    accuracy: list[float]
    kl: list[float]
    """KL(student || teacher) on the student's own samples, in nats per token."""
    teacher: float
    """The teacher's accuracy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, default=Path("runs/on_off_policy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    curves: dict[str, list[Curve]] = {}
    for seed in arguments.seeds:
        for kind in KINDS:
            curves.setdefault(kind, []).append(read(run(kind, seed, arguments.root)))
    draw(curves, arguments.out)
    tokens = min(curve.tokens[-1] for of_kind in curves.values() for curve in of_kind)
    print(f"at {tokens} response tokens, the most that all runs reached:")
    for kind, of_kind in curves.items():
        for seed, curve in zip(arguments.seeds, of_kind, strict=True):
            accuracy, kl = (numpy.interp(tokens, curve.tokens, values) for values in (curve.accuracy, curve.kl))
            print(f"{kind:8} seed {seed}  accuracy {accuracy:.3f}  KL {kl:.4f}  ({curve.tokens[-1]} tokens in all)")


def run(kind: str, seed: int, root: Path) -> Path:
    """Return the folder of a finished run; run it first if necessary."""
    folder = root / f"{kind}_{seed}"
    if not (folder / "outcome.json").is_file():
        argv = [*SHARED, *KINDS[kind][2], f"train.seed={seed}", f"run.root={root}", f"run.name={folder.name}"]
        subprocess.run([sys.executable, "-m", "distill_cli", *argv], check=True, stdout=sys.stderr)
    return folder


def read(folder: Path) -> Curve:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    total, tokens, accuracy, kl = 0, [], [], []
    for row in rows:
        total += int(row.get("train/response_tokens", 0))
        if "val/accuracy" in row:
            tokens.append(total)
            accuracy.append(row["val/accuracy"])
            table = pyarrow.parquet.read_table(folder / f"rollouts/step_{row['step']}.parquet", columns=["kl_reverse"])
            kl.append(fmean(value for values in table["kl_reverse"].to_pylist() for value in values))
    return Curve(tokens, accuracy, kl, rows[0]["val/teacher_accuracy"])


def draw(curves: dict[str, list[Curve]], out: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    accuracy, divergence = panels
    teacher = next(iter(curves.values()))[0].teacher
    accuracy.axhline(teacher, color="#777777", linestyle="--", linewidth=1)
    accuracy.annotate("teacher", (0, teacher), (2, 3), textcoords="offset points", color="#777777", fontsize=9)
    for kind, of_kind in curves.items():
        label, color, _ = KINDS[kind]
        draw_kind(accuracy, [(curve.tokens, curve.accuracy) for curve in of_kind], color=color, label=label)
        draw_kind(divergence, [(curve.tokens, curve.kl) for curve in of_kind], color=color, label=label)
    accuracy.set_ylim(0, 1.08)
    accuracy.set_ylabel("held-out answers that are right")
    accuracy.legend(frameon=False, fontsize=9, loc="lower right")
    divergence.set_yscale("log")
    divergence.set_ylabel("KL(student || teacher), nats per token")
    for axes in panels:
        axes.set_xlabel("response tokens trained on")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(out, metadata={"Date": None})


def draw_kind(axes: Axes, lines: Sequence[tuple[list[int], list[float]]], *, color: str, label: str) -> None:
    """Draw each seed as a thin line, and the mean over seeds at each validation."""
    for tokens, values in lines:
        axes.plot(tokens, values, color=color, linewidth=0.8, alpha=0.4)
    means = [[fmean(column) for column in zip(*part, strict=True)] for part in zip(*lines, strict=True)]
    style = "o:" if color == KINDS["dataset"][1] else "o-"  # it may coincide with the teacher's
    axes.plot(*means, style, color=color, linewidth=1.6, markersize=3, label=label)


if __name__ == "__main__":
    main()
