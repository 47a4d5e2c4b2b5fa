"""Draw students of one teacher that adds, of one that subtracts, and of both, on a task with both kinds of problems.

    python scripts/compare_teachers.py docs/two_teachers.svg [--root runs/two_teachers] [--seeds 42 43 44]

Make the two teachers, then run the command once per seed and kind, except what was done before. A teacher is made as
the tiny pair's is, but its steps of the other operator are careless (`make_tiny_pair.careless_solution`). Half of the
rows are additions, half subtractions; a student of both is scored by the teacher of each row. Left: accuracy on
held-out rows of both kinds. Right: by kind at the end. Print one row per run. Needs matplotlib (in the dev group).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
# The same runs give the same file, and its text stays text.
matplotlib.rcParams |= {"svg.hashsalt": "distill", "svg.fonttype": "none"}

import matplotlib.pyplot as plt
import torch
from make_tiny_pair import (
    NUM_VALIDATION_PROBLEMS,
    OUT,
    RECIPES,
    careless_solution,
    make_model,
    measure_accuracy,
    train,
    training_problems,
)
from transformers import AutoTokenizer

from distill_cli.data.sources.arithmetic import load

OPERATORS = {"add": "+", "subtract": "-"}
KINDS = {
    "both": ("both teachers", "#2a6fdb"),
    "add": ("the one that adds", "#d9722a"),
    "subtract": ("the one that subtracts", "#444444"),
}
"""Name -> label, colour."""
SHARED = ("data.verifier=exact", "train.max_steps=60", "eval.period=6", "checkpoint.enabled=false", "tracker=none")


@dataclass(frozen=True)
class Curve:
    """The validations of one run."""

    steps: list[int]
    accuracy: list[float]
    last: dict[str, float]
    """Accuracy at the end, by operator."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, default=Path("runs/two_teachers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    teachers = {name: make_teacher(name, arguments.root.absolute() / "teachers") for name in OPERATORS}
    curves = {kind: [read(run(kind, seed, teachers, arguments.root)) for seed in arguments.seeds] for kind in KINDS}
    draw(curves, arguments.out)
    for kind, of_kind in curves.items():
        for seed, curve in zip(arguments.seeds, of_kind, strict=True):
            parts = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in curve.last.items())
            print(f"{kind:9} seed {seed}  from {curve.accuracy[0]:.1%} to {curve.accuracy[-1]:.1%}  ({parts})")


def make_teacher(name: str, root: Path) -> Path:
    """Return the folder of a teacher that is right about one operator; train it first if necessary."""
    folder = root / name
    if (folder / "tokenizer.json").is_file():
        return folder
    torch.set_num_threads(1)
    tokenizer, recipe = AutoTokenizer.from_pretrained(OUT / "teacher"), RECIPES["teacher"]
    (course,), (other,) = recipe.courses, OPERATORS.keys() - {name}
    course = replace(course, solve=partial(careless_solution, operators=OPERATORS[other]))
    model = make_model(recipe, tokenizer)
    train(model, course, training_problems(), tokenizer, seed=recipe.seed)
    for other, operators in OPERATORS.items():
        held_out = load(split="validation", size=NUM_VALIDATION_PROBLEMS, seed=0, operators=operators)
        accuracy = measure_accuracy(model, tokenizer, held_out, temperature=0.0)
        print(f"teacher {name}: {accuracy:.1%} of held-out problems of {other}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(kind: str, seed: int, teachers: dict[str, Path], root: Path) -> Path:
    """Return the folder of a finished run; run it first if necessary."""
    folder = root / f"{kind}_{seed}"
    if not (folder / "outcome.json").is_file():
        argv = ["data=sources", *SHARED, f"train.seed={seed}", f"run.root={root}", f"run.name={folder.name}"]
        argv += [f"data.{part}.sources={sources(part, size)}" for part, size in (("train", 4096), ("validation", 256))]
        if kind == "both":
            argv += [f"model.teachers.{name}.path={path}" for name, path in teachers.items()]
        else:
            argv += [f"model.teacher.path={teachers[kind]}"]
        subprocess.run([sys.executable, "-m", "distill_cli", *argv], check=True, stdout=sys.stderr)
    return folder


def sources(split: str, size: int) -> str:
    """Return additions and subtractions as sources that have the names of the teachers."""
    one = "{name}: {{source: arithmetic, split: {split}, size: {size}, seed: 0, operators: '{operators}'}}"
    parts = [one.format(name=name, split=split, size=size, operators=sign) for name, sign in OPERATORS.items()]
    return f"{{{', '.join(parts)}}}"


def read(folder: Path) -> Curve:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "val/accuracy" in row]
    last = {name: rows[-1][f"val/{name}/accuracy"] for name in OPERATORS}
    return Curve([row["step"] for row in rows], [row["val/accuracy"] for row in rows], last)


def draw(curves: dict[str, list[Curve]], out: Path) -> None:
    figure, (accuracy, bars) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=[3, 2])
    for place, (kind, of_kind) in enumerate(curves.items()):
        label, color = KINDS[kind]
        for curve in of_kind:
            accuracy.plot(curve.steps, curve.accuracy, color=color, linewidth=0.8, alpha=0.4)
        means = [fmean(column) for column in zip(*(curve.accuracy for curve in of_kind), strict=True)]
        accuracy.plot(of_kind[0].steps, means, "o-", color=color, linewidth=1.6, markersize=3, label=label)
        heights = [fmean(curve.last[name] for curve in of_kind) for name in OPERATORS]
        bars.bar([at + 0.26 * (place - 1) for at in range(len(heights))], heights, width=0.24, color=color)
    accuracy.set_xlabel("step")
    accuracy.set_ylabel("held-out answers that are right")
    accuracy.legend(frameon=False, fontsize=9, loc="lower right", title="student of", title_fontsize=9)
    bars.set_xticks(range(len(OPERATORS)), ["additions", "subtractions"])
    for axes in (accuracy, bars):
        axes.set_ylim(0, 1.05)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
