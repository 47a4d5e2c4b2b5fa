"""Draw a run's accuracy and KL over its steps: the figure of the README.

    distill run.name=figure && python scripts/plot_run.py runs/figure docs/default_run.svg

Needs matplotlib (in the dev group).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
# The same run gives the same file, and its text stays text.
matplotlib.rcParams |= {"svg.hashsalt": "distill", "svg.fonttype": "none"}

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2a6fdb", "#d9722a", "#777777"


def main() -> None:
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (accuracy, divergence) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw_accuracy(accuracy, rows)
    draw_divergence(divergence, rows)
    for axes in (accuracy, divergence):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(out, metadata={"Date": None})


def draw_accuracy(axes: Axes, rows: list[dict]) -> None:
    """Draw the student's accuracy, held out and sampled in training, with the teacher's as a line."""
    teacher = rows[0]["val/teacher_accuracy"]
    validated = [row for row in rows if "val/accuracy" in row]
    trained = [row for row in rows if "rollout/accuracy" in row]
    axes.axhline(teacher, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("teacher", (0, teacher), (2, 3), textcoords="offset points", color=GREY, fontsize=9)
    for points, key, style, color, label in (
        (trained, "rollout/accuracy", "-", ORANGE, "sampled in training"),
        (validated, "val/accuracy", "o-", BLUE, "held out, greedy"),
    ):
        axes.plot([row["step"] for row in points], [row[key] for row in points], style, color=color, label=label)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("share of answers that are right")


def draw_divergence(axes: Axes, rows: list[dict]) -> None:
    steps = [row for row in rows if "train/kl_forward" in row]
    for key, color, label in (
        ("train/kl_forward", BLUE, "KL(teacher || student)"),
        ("train/kl_reverse", ORANGE, "KL(student || teacher)"),
    ):
        axes.plot([row["step"] for row in steps], [row[key] for row in steps], color=color, lw=1.5, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
