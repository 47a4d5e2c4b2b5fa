"""Measure carry-over against waiting for the longest answer, in response tokens per second.

    python scripts/bench_carry_over.py [--per-slot 256 512 1024] [--layers 1]
    python scripts/bench_carry_over.py --accuracy [--seeds 42 43 44]

The first runs `distill` with a model whose answers have lognormal lengths (`length_model.py`: median 200, sigma 1, cut
at 2,048 tokens) and 64 sequences at a time: waiting for all, with `rollout.carry_over` at several budgets per slot, and
waiting once more, which shows the noise. Each step counts from the one on at which the oldest answers may be cut off.

The second trains the embedded pair with and without carry-over to the same number of response tokens, and prints the
accuracy of each seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from scripts.length_model import facts_of, make_model
except ModuleNotFoundError:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from scripts.length_model import facts_of, make_model

LONGEST, SLOTS = 2048, 64
QUIET = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0", "tracker=none")
LONG = (
    *(f"rollout.max_new_tokens={LONGEST}", f"rollout.max_sequence_length={LONGEST + 64}", "data.max_prompt_tokens=64"),
    *("train.micro_batch_tokens=4224", "train.lr=1e-6", "rollout.max_truncated_rate=1", "checkpoint.enabled=false"),
    *("engine.student.kv_cache_gib=0.25", "engine.teacher.kv_cache_gib=0.125"),
)
MEASURED = 6
"""Steps that count."""


def steps_of(folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Run `distill` in a folder of its own; return its rows."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        command = [sys.executable, "-m", "distill_cli", f"run.root={root}", "run.name=run", *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return [json.loads(line) for line in (Path(root) / "run/metrics.jsonl").read_text().splitlines()]


def speed(folder: Path, *, per_slot: int | None) -> dict[str, float]:
    """Return tokens per second and seconds per 10,000 response tokens of each stage; `per_slot` None waits for all."""
    warm_up, models = 1, [f"model.{role}.path={folder / role}" for role in ("student", "teacher")]
    overrides = [*models, *LONG, *QUIET]
    if per_slot is not None:
        warm_up = -(-LONGEST // per_slot)
        overrides += ["rollout.carry_over=true", f"rollout.tokens_per_step={SLOTS * per_slot}"]
    rows = steps_of(folder, [*overrides, f"train.max_steps={warm_up + MEASURED}"])
    rows = [row for row in rows if row["step"] > warm_up]
    tokens = sum(row["train/response_tokens"] for row in rows)
    seconds = {name: sum(row[f"time/{name}_s"] for row in rows) for name in ("step", "sample", "score", "train")}
    return {"tok/s": tokens / seconds["step"], **{name: 1e4 * value / tokens for name, value in seconds.items()}}


def bench_speed(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        with contextlib.redirect_stderr(io.StringIO()):
            make_model(folder / "student", layers=arguments.layers)
            make_model(folder / "teacher", median=260, sigma=1.2, layers=arguments.layers)
        facts = facts_of(median=200, sigma=1, longest=LONGEST)
        print("lengths:", ", ".join(f"{name} {value:.4g}" for name, value in facts.items()))
        base, again = None, "waiting, again"
        print(
            f"{'tokens per slot':>16}  {'tok/s':>7}  {'ratio':>5}  seconds per 10,000 tokens: step sample score train"
        )
        for what in ("waiting", *arguments.per_slot, again):
            found = speed(folder, per_slot=what if isinstance(what, int) else None)
            base = base or found["tok/s"]
            stages = " ".join(f"{found[name]:.2f}" for name in ("step", "sample", "score", "train"))
            print(f"{what!s:>16}  {found['tok/s']:7.0f}  {found['tok/s'] / base:5.2f}  {stages}", flush=True)


def bench_accuracy(arguments: argparse.Namespace) -> None:
    """Compare at equal response tokens: carry-over's steps have as many as waiting's on average."""
    quiet = ["eval.period=0", "eval.record_samples=0", "tracker=none", "checkpoint.enabled=false"]
    print(f"{'seed':>6}  {'run':>10}  {'steps':>5}  {'tokens':>7}  {'before':>6}  {'after':>6}")
    for seed in arguments.seeds:
        rows = steps_of(Path(tempfile.gettempdir()), [f"train.seed={seed}", *quiet])
        tokens = sum(row.get("train/response_tokens", 0) for row in rows)
        budget = round(tokens / 100)
        runs = {"waiting": rows}
        carry = [f"train.seed={seed}", "rollout.carry_over=true", f"rollout.tokens_per_step={budget}", *quiet]
        for per_slot in (budget // SLOTS, budget // SLOTS // 3):
            steps = round(tokens / (per_slot * SLOTS))
            sized = [f"rollout.tokens_per_step={per_slot * SLOTS}", f"train.max_steps={steps}"]
            runs[f"{per_slot} a slot"] = steps_of(Path(tempfile.gettempdir()), [*carry, *sized])
        for name, found in runs.items():
            val = [row["val/accuracy"] for row in found if "val/accuracy" in row]
            total = sum(row.get("train/response_tokens", 0) for row in found)
            cells = f"{found[-1]['step']:>5}  {total:>7.0f}  {val[0]:>6.3f}  {val[-1]:>6.3f}"
            print(f"{seed:>6}  {name:>10}  {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-slot", type=int, nargs="+", default=[256, 512, 1024], help="tokens that a slot writes")
    parser.add_argument("--layers", type=int, default=1, help="of the model")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    (bench_accuracy if arguments.accuracy else bench_speed)(arguments)


if __name__ == "__main__":
    main()
