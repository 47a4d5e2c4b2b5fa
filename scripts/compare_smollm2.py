"""Compare what a pruned SmolLM2 learns from at equal tokens; docs/results.md has what came out.

    pip download --no-deps evals
    python scripts/compare_smollm2.py values.json --evals evals-*.whl
    python scripts/compare_smollm2.py docs/results.json --write docs/results.md --figure docs/results.svg

In the folder of the pair that `distill ls experiment=smollm2` says how to make: measure the teacher and the student
before training, then run the command once per seed and kind and measure each student. Every measurement is kept in the
file of values, and is not done again. The tables have means and 95% intervals over the seeds, of each kind and of the
differences between kinds, seed by seed. `--write` replaces those between the markers of a document. Needs matplotlib
and lm-eval (in the dev group).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib
from findings import write
from matplotlib.figure import Figure
from smollm2_measure import Measures, write_suite

from distill_cli.report.pools import mean_of

OF_TEACHER = ("rollout.on_policy_fraction=0", "rollout.off_policy=teacher")
KINDS = {
    "supervised": ("supervised on the teacher's answers", "#444444", ("loss=sft", *OF_TEACHER)),
    "off_policy": ("off-policy distillation", "#d9722a", OF_TEACHER),
    "on_policy": ("on-policy distillation", "#2a6fdb", ()),
}
"""Name -> label, colour, overrides."""
SHARED = (
    *("experiment=smollm2", "train.max_steps=24", "eval.at_start=false", "eval.at_end=false"),
    *("checkpoint.enabled=false", "tracker=none"),
)
MODELS = {"before": Path("smollm2/student"), "teacher": Path("smollm2/teacher")}
SHARE, NATS, BITS = "{:.1%}", "{:.3f}", "{:.3f}"
MEASURES = {
    "own/kl_reverse": ("KL(student ‖ teacher) on its own answers, nats", NATS),
    "own/agreement": ("same likeliest token on its own answers", SHARE),
    "teacher/kl_forward": ("KL(teacher ‖ student) on the teacher's answers, nats", NATS),
    "teacher/agreement": ("same likeliest token on the teacher's answers", SHARE),
    "web_text": ("bits per byte of web text", BITS),
    "last_word": ("last words of web text", SHARE),
    "social_iqa": ("Social IQa", SHARE),
    "tokens": ("response tokens trained on", "{:,.0f}"),
    "seconds": ("seconds of all steps", "{:,.0f}"),
}
"""Name -> title, format."""
SUMS = {"tokens": "train/response_tokens", "seconds": "time/step_s"}
PAIRS = (("on_policy", "off_policy"), ("off_policy", "supervised"))
"""Kinds whose difference is a question of its own: who writes, and what the student is told."""
COMPARED = ("own/kl_reverse", "own/agreement", "teacher/kl_forward", "teacher/agreement", "web_text")
DRAWN = ("own/kl_reverse", "teacher/kl_forward", "own/agreement", "web_text")

Values = dict[str, dict[str, float]]
"""Model, or kind and seed -> what was measured."""
Columns = dict[str, dict[int, dict[str, float]]]
"""Model or kind -> seed -> what was measured; of a model, seed 0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", type=Path, help="file of what was measured, which is added to")
    parser.add_argument("--evals", type=Path, help="wheel of the package evals, to measure with")
    parser.add_argument("--root", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--write", type=Path, help="a document whose table is replaced")
    parser.add_argument("--figure", type=Path, help="a figure to write")
    arguments = parser.parse_args()
    values: Values = json.loads(arguments.values.read_text()) if arguments.values.exists() else {}
    if arguments.evals is not None:
        write_suite(arguments.evals, arguments.root / "suite")
        measures = Measures(MODELS["teacher"], arguments.root / "suite")
        for name in (*MODELS, *(f"{kind}_{seed}" for seed, kind in product(arguments.seeds, KINDS))):
            if name not in values:
                values[name] = measures(MODELS[name]) if name in MODELS else trained(name, arguments.root, measures)
                arguments.values.write_text(json.dumps(values, indent=1) + "\n")
    columns: Columns = {name: {0: values[name]} for name in MODELS}
    for kind in KINDS:
        names = {seed: f"{kind}_{seed}" for seed in arguments.seeds}
        columns[kind] = {seed: values[name] for seed, name in names.items() if name in values}
    texts = {"compare": table(columns), "differences": differences(columns)}
    print("\n\n".join(texts.values()))
    if arguments.write:
        for name, text in texts.items():
            write(arguments.write, name, text)
    if arguments.figure:
        draw(columns, arguments.figure)


def trained(name: str, root: Path, measures: Measures) -> dict[str, float]:
    """Measure the student of a kind and seed; train it first if necessary."""
    folder, (kind, _, seed) = root / name, name.rpartition("_")
    if not (folder / "outcome.json").is_file():
        argv = [*SHARED, *KINDS[kind][2], f"train.seed={seed}", f"run.root={root}", f"run.name={name}"]
        subprocess.run([sys.executable, "-m", "distill_cli", *argv], check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sums = {key: sum(row[metric] for row in rows if row["step"]) for key, metric in SUMS.items()}
    return sums | measures(folder / "student")


def table(columns: Columns) -> str:
    """Return a row of each measure; a column has one set of values per seed."""
    titles = {"before": "before", **{kind: label for kind, (label, *_) in KINDS.items()}, "teacher": "the teacher"}
    lines = [f"|  | {' | '.join(titles.values())} |", "|" + "---|" * (len(titles) + 1)]
    for name, (title, shown) in MEASURES.items():
        cells = (cell([one[name] for one in columns[column].values() if name in one], shown) for column in titles)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(columns: Columns) -> str:
    """Return a row of each measure: the differences between kinds within a seed, which sees the same requests."""
    titles = [
        " minus ".join(KINDS[kind][0].removesuffix(" on the teacher's answers") for kind in pair) for pair in PAIRS
    ]
    lines = [f"|  | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for name in COMPARED:
        title, shown = MEASURES[name]
        pairs = [(columns[kind], columns[other]) for kind, other in PAIRS]
        found = ([one[seed][name] - other[seed][name] for seed in one if seed in other] for one, other in pairs)
        cells = (cell(values, shown.replace(":", ":+")) for values in found)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float], shown: str) -> str:
    if not values:
        return ""
    mean = mean_of(values)
    half = "" if mean.half is None else f" ± {shown.replace('+', '').format(mean.half)}"
    return f"{shown.format(mean.value)}{half}"


def draw(columns: Columns, out: Path) -> None:
    """Draw a panel of each measure: seeds as small points, means as large ones, the two models as lines."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for axes, name in zip(panels.flat, DRAWN, strict=True):
        for place, (kind, (_, color, _)) in enumerate(KINDS.items()):
            values = [one[name] for one in columns[kind].values()]
            mean = mean_of(values)
            axes.plot(values, [place] * len(values), "o", color=color, markersize=3, alpha=0.5)
            axes.errorbar(mean.value, place, xerr=mean.half, fmt="o", color=color, markersize=6, capsize=3)
        for model, style in (("before", ":"), ("teacher", "--")):
            value = columns[model][0][name]
            axes.axvline(value, color="#777777", linestyle=style, linewidth=1)
            axes.annotate(model, (value, 2.55), ha="center", color="#777777", fontsize=8, annotation_clip=False)
        axes.set_xlabel(MEASURES[name][0], fontsize=8)
        axes.set_yticks(range(len(KINDS)), [label for label, *_ in KINDS.values()], fontsize=9)
        axes.set_ylim(-0.5, 2.5)
        axes.spines[["top", "right"]].set_visible(False)
        if MEASURES[name][1] == SHARE:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    # The same numbers give the same file, and its text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "distill", "svg.fonttype": "none"}):
        figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
