"""Draw what staleness costs: accuracy and KL after the same number of steps, by `rollout.staleness` and loss.

    python scripts/compare_staleness.py docs/staleness.svg [--root runs/staleness] [--seeds 42 43 44]

Run the command on the tiny pair once per loss, staleness and seed, except runs that have finished before. Left:
accuracy on held-out prompts. Right: KL(student || teacher) at the tokens that the student samples for held-out prompts.
Print one row per loss and staleness, with all seeds. Needs matplotlib (in the dev group).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
# The same runs give the same file, and its text stays text.
matplotlib.rcParams |= {"svg.hashsalt": "distill", "svg.fonttype": "none"}

import matplotlib.pyplot as plt

LOSSES = {"forward": "#2a6fdb", "reverse": "#d9722a", "policy_gradient": "#444444"}
STEPS_BEFORE = (0, 1, 2, 4, 8)
SHARED = ("train.max_steps=40", "eval.period=0", "eval.record_samples=64", "checkpoint.enabled=false", "tracker=none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for loss in LOSSES:
            for staleness in STEPS_BEFORE:
                last = read(run(loss, staleness, seed, arguments.root))
                found.setdefault((loss, staleness), []).append(last)
    draw(found, arguments.out)
    print(f"{'loss':16} staleness  accuracy (mean, seeds)       KL reverse (mean, seeds)       drift")
    for (loss, staleness), rows in found.items():
        accuracy, kl = ([row[name] for row in rows] for name in ("val/accuracy", "probe/kl_reverse"))
        drift = fmean(row.get("rollout/drift", row.get("rollout/engine_mismatch", 0.0)) for row in rows)
        seeds = [" ".join(f"{value:.3f}" for value in values) for values in (accuracy, kl)]
        cells = f"{fmean(accuracy):.3f} ({seeds[0]})  {fmean(kl):.4f} ({seeds[1]})  {drift:.2g}"
        print(f"{loss:16} {staleness:9}  {cells}")


def run(loss: str, staleness: int, seed: int, root: Path) -> Path:
    """Return the folder of a finished run; run it first if necessary."""
    folder = root / f"{loss}_{staleness}_{seed}"
    if not (folder / "outcome.json").is_file():
        keys = [f"loss={loss}", f"rollout.staleness={staleness}", f"train.seed={seed}"]
        argv = [*SHARED, *keys, f"run.root={root}", f"run.name={folder.name}"]
        subprocess.run([sys.executable, "-m", "distill_cli", *argv], check=True, stdout=subprocess.DEVNULL)
    return folder


def read(folder: Path) -> dict[str, float]:
    """Return the row of a run's last step."""
    last: dict[str, float] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return last


def draw(found: dict[tuple[str, int], list[dict[str, float]]], out: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = ("val/accuracy", "probe/kl_reverse")
    for axes, name in zip(panels, names, strict=True):
        for loss, color in LOSSES.items():
            lines = [[row[name] for row in found[loss, staleness]] for staleness in STEPS_BEFORE]
            for place, values in enumerate(lines):
                axes.plot([place] * len(values), values, ".", color=color, alpha=0.4)
            axes.plot(range(len(lines)), [fmean(values) for values in lines], "o-", color=color, label=loss)
        axes.set_xticks(range(len(STEPS_BEFORE)), [str(one) for one in STEPS_BEFORE])
        axes.set_xlabel("rollout.staleness, steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylim(0, 1.05)
    panels[0].set_ylabel("held-out answers that are right")
    panels[0].legend(frameon=False, fontsize=9, loc="lower left")
    panels[1].set_yscale("log")
    panels[1].set_ylabel("KL(student || teacher), nats per token")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
