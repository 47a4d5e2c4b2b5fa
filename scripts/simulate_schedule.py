"""Predict the time of a step for each schedule, from measured runs and a distribution of lengths.

    python scripts/simulate_schedule.py --measure runs/schedules        # run on this machine, fit, compare
    python scripts/simulate_schedule.py --fitted runs/schedules/costs.json --gpus 1 8 64 1024

The schedules: `shared` (every rank samples whole answers, scores, trains), `carry_over` (a fixed number of tokens per
step), `ahead` (`split` with `rollout.staleness=1`: sampling at the same time as scoring and training), and both
together. What a step of each needs is counted on drawn lengths: tokens decoded one after the other by the slowest
engine (`decodes`), tokens decoded in all of these (`batched`), tokens read again (`prefill`), tokens that the teacher
and the trainer read, tokens with a loss. A stage's time is a sum of these counts times costs:

    sample = a decodes + b batched + c prefill + d
    score  = e scored + f
    train  = g computed + h responses + i

The costs are fitted (non-negative least squares) to measured stages of some runs, and compared with others. Ranks that
have less than a core each share the cores: their times grow by ranks / cores while all work, and not while they wait.

Left out: KV caches that are too small for all sequences of an engine, communication that grows with the number of GPUs
(--sync and --fixed set seconds), imbalance between trainers, whose packing is even.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

STAGES = {
    "sample": ("decodes", "batched", "prefill", "one"),
    "score": ("read", "one"),
    "train": ("read", "responses", "one"),
}


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths of answers, cut at `longest`."""

    median: float = 200
    sigma: float = 1
    longest: int = 2048
    prompt: int = 33

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.minimum(np.ceil(self.median * np.exp(self.sigma * rng.standard_normal(size))), self.longest)


@dataclass(frozen=True)
class Schedule:
    """How a step is done."""

    sequences: int
    """Sequences of a step, or its slots."""
    trainers: int
    samplers: int = 0
    """Ranks that sample alone; 0 is all."""
    per_slot: int = 0
    """Tokens that a slot writes in a step (`carry_over`); 0 is whole answers."""
    ahead: bool = False
    """Whether sampling goes on while others train."""

    @property
    def name(self) -> str:
        kinds = ["carry_over"] if self.per_slot else []
        kinds += ["ahead"] if self.ahead else ["split"] if self.samplers else []
        return "+".join(kinds) or "shared"

    @property
    def engines(self) -> int:
        return self.samplers or self.trainers


def counts(schedule: Schedule, lengths: Lengths, *, draws: int = 200, seed: int = 0) -> dict[str, float]:
    """Return the mean counts of a step: of the slowest engine, and of one trainer's share."""
    rng = np.random.default_rng(seed)
    sequences, engines = schedule.sequences, schedule.engines
    if schedule.per_slot:
        quota, per_engine = schedule.per_slot, -(-sequences // engines)
        # Renewal process: a slot writes answer after answer, and each step cuts off the one that is being written.
        carried, pieces = [], []
        for _ in range(max(8, draws // 8)):
            answers = lengths.draw(rng, 400)
            ends = np.cumsum(answers)
            begins = ends - answers
            cuts = np.arange(1, int(ends[-1] // quota)) * quota
            at = np.searchsorted(ends, cuts, side="right")
            carried.append((cuts - begins[at]).mean())
            pieces.append(1 + len(answers) / (ends[-1] / quota))
        context, number = float(np.mean(carried)), float(np.mean(pieces))
        responses = sequences * quota
        read = responses + sequences * (context + number * lengths.prompt)
        prefill = per_engine * (context + number * lengths.prompt)
        found = {"decodes": quota, "batched": quota * per_engine, "prefill": prefill}
    else:
        rows = []
        for _ in range(draws):
            drawn = lengths.draw(rng, sequences)
            by_engine = [drawn[first::engines] for first in range(engines)]
            longest, total = max(one.max() for one in by_engine), max(one.sum() for one in by_engine)
            rows.append((longest, total, drawn.sum()))
        longest, total, responses = np.mean(rows, axis=0)
        read = responses + sequences * lengths.prompt
        prefill = -(-sequences // engines) * lengths.prompt
        found = {"decodes": longest, "batched": total, "prefill": prefill}
    share = schedule.trainers
    return {**found, "read": read / share, "responses": responses / share, "tokens": responses, "one": 1.0}


@dataclass
class Costs:
    """Seconds of one of each count, by stage."""

    stages: dict[str, list[float]]
    sync_s: float = 0.0

    def stage(self, name: str, found: dict[str, float]) -> float:
        return float(np.dot(self.stages[name], [found[one] for one in STAGES[name]]))

    def step(self, schedule: Schedule, lengths: Lengths, *, cores: int | None = None) -> dict[str, float]:
        """Return the seconds of each stage and of a step.

        Args:
            cores: those that all ranks share; None if each has its own device.
        """
        found = counts(schedule, lengths)
        times = {name: self.stage(name, found) for name in STAGES}
        working = schedule.trainers + schedule.samplers * schedule.ahead
        slower = 1.0 if cores is None else max(1.0, working / cores)
        slow_sampler = slower if cores is None or schedule.ahead else max(1.0, schedule.engines / cores)
        sample, rest = times["sample"] * slow_sampler, (times["score"] + times["train"]) * slower
        step = (max(sample, rest) if schedule.ahead else sample + rest) + self.sync_s
        return {"sample": sample, "score": times["score"] * slower, "train": times["train"] * slower, "step": step,
                "tokens/s": found["tokens"] / step}  # fmt: skip


def fit(measured: Sequence[tuple[Schedule, dict[str, float]]], lengths: Lengths) -> Costs:
    """Return the costs that explain the measured stages best."""
    stages = {}
    for name, columns in STAGES.items():
        rows = [([counts(schedule, lengths)[one] for one in columns], times[name]) for schedule, times in measured]
        matrix, seconds = np.array([row for row, _ in rows]), np.array([seconds for _, seconds in rows])
        stages[name] = list(non_negative(matrix / seconds[:, None]))  # relative errors
    return Costs(stages, float(np.mean([times["sync"] for _, times in measured])))


def non_negative(matrix: np.ndarray) -> np.ndarray:
    """Return the x of no negative element with the least |matrix x - 1|, by trying which elements are 0."""
    columns, best, least = range(matrix.shape[1]), np.zeros(matrix.shape[1]), float("inf")
    for number in range(1, matrix.shape[1] + 1):
        for chosen in map(list, combinations(columns, number)):
            scale = matrix[:, chosen].max(0)
            found = np.linalg.lstsq(matrix[:, chosen] / scale, np.ones(len(matrix)), rcond=None)[0] / scale
            error = float(np.square(matrix[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(matrix.shape[1]), error
                best[chosen] = found
    return best


@dataclass(frozen=True)
class Run:
    """A run on this machine."""

    schedule: Schedule
    is_fitted: bool
    overrides: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        own = self.schedule
        parts = [own.name, f"{own.trainers}+{own.samplers}", f"{own.sequences}x{own.per_slot}"]
        return "_".join(parts)


SHARED = Schedule(sequences=64, trainers=1)
RUNS = (
    Run(SHARED, True),
    Run(replace(SHARED, sequences=32), True),
    Run(replace(SHARED, per_slot=256), True),
    Run(replace(SHARED, per_slot=512, sequences=32), True),
    Run(replace(SHARED, trainers=2), False),
    Run(replace(SHARED, per_slot=512), False),
    Run(replace(SHARED, trainers=2, per_slot=512), False),
    Run(replace(SHARED, trainers=2, per_slot=256), False),
    Run(replace(SHARED, samplers=1, ahead=True), False),
    Run(replace(SHARED, samplers=1, ahead=True, per_slot=512), False),
    Run(replace(SHARED, trainers=4, per_slot=512), False),
    Run(replace(SHARED, trainers=2, samplers=2, ahead=True, per_slot=512), False),
)


def measure(run: Run, folder: Path, models: Path) -> dict[str, float]:
    """Return the mean seconds of each stage of a run, which is made first if necessary."""
    from scripts.bench_carry_over import LONG, QUIET

    own, path, warm_up = run.schedule, folder / run.name, 1
    overrides = [f"model.{role}.path={models / role}" for role in ("student", "teacher")]
    overrides += [
        *LONG,
        *QUIET,
        f"rollout.prompts_per_step={own.sequences}",
        f"train.global_batch_size={own.sequences}",
    ]
    overrides += [f"cluster.ranks_per_node={own.trainers + own.samplers}", "cluster.env.OMP_NUM_THREADS=1"]
    if own.per_slot:
        warm_up = -(-2048 // own.per_slot)
        overrides += ["rollout.carry_over=true", f"rollout.tokens_per_step={own.sequences * own.per_slot}"]
    if own.samplers:
        overrides += ["cluster.roles=split", f"engine.student.ranks={own.samplers}", "rollout.staleness=1"]
    if not (path / "outcome.json").exists():
        argv = [*overrides, f"train.max_steps={warm_up + 8}", f"run.root={folder}", f"run.name={run.name}"]
        done = subprocess.run([sys.executable, "-m", "distill_cli", *argv], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > warm_up]

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    sample = mean("roles/sample_s") if own.samplers else mean("time/sample_s")
    times = {name: mean(f"time/{name}_s") for name in ("score", "train", "sync", "step")}
    return {**times, "sample": sample, "tokens/s": mean("train/response_tokens") / times["step"]}


def compare(folder: Path) -> None:
    """Run, fit and compare on this machine."""
    from scripts.length_model import make_model

    folder, lengths, cores = folder.absolute(), Lengths(), len(os.sched_getaffinity(0))
    with contextlib.redirect_stderr(io.StringIO()):
        make_model(folder / "models/student")
        make_model(folder / "models/teacher", median=260, sigma=1.2)
    measured = [(run, measure(run, folder, folder / "models")) for run in RUNS]
    costs = fit([(run.schedule, times) for run, times in measured if run.is_fitted], lengths)
    (folder / "costs.json").write_text(json.dumps({"stages": costs.stages, "sync_s": costs.sync_s}, indent=1))
    print(f"{'run':28} {'':9} sample  score  train   step s  (predicted)  ratio  tokens/s")
    for run, times in measured:
        guess = costs.step(run.schedule, lengths, cores=cores)
        stages = " ".join(f"{times[name]:6.2f}" for name in ("sample", "score", "train"))
        row = (
            f"{times['step']:8.2f} {guess['step']:12.2f} {guess['step'] / times['step']:6.2f} {times['tokens/s']:9.0f}"
        )
        print(f"{run.name:28} {'fitted' if run.is_fitted else 'predicted':9} {stages} {row}")


def predict(arguments: argparse.Namespace) -> None:
    """Print step times from 1 to many GPUs, with so many sequences on each."""
    costs = Costs(**json.loads(arguments.fitted.read_text()))
    costs.sync_s = arguments.sync if arguments.sync is not None else costs.sync_s
    lengths = Lengths(arguments.median, arguments.sigma, arguments.longest, arguments.prompt)
    per_slot = arguments.per_slot or arguments.longest // 4
    print(f"{'GPUs':>5} {'schedule':17} {'train':>6}+{'sample':6} {'step s':>8} {'tokens/s':>10} {'of shared':>9}")
    for gpus in arguments.gpus:
        shared = Schedule(sequences=arguments.sequences * gpus, trainers=gpus)
        choices = [shared, replace(shared, per_slot=per_slot)]
        for slots in (0, per_slot) if gpus > 1 else ():
            splits = [
                replace(shared, trainers=gpus - samplers, samplers=samplers, ahead=True, per_slot=slots)
                for samplers in sorted({max(1, round(gpus * eighths / 8)) for eighths in range(1, 8)})
                if samplers < gpus
            ]
            choices.append(max(splits, key=lambda one: costs.step(one, lengths)["tokens/s"]))
        base = costs.step(shared, lengths)["tokens/s"]
        for one in choices:
            found = costs.step(one, lengths)
            where = f"{one.trainers:6}+{one.samplers:<6}"
            speed = f"{found['step']:8.2f} {found['tokens/s']:10.0f} {found['tokens/s'] / base:9.2f}"
            print(f"{gpus:5} {one.name:17} {where} {speed}")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", type=Path, metavar="FOLDER", help="run here, except what has been run before")
    what.add_argument("--fitted", type=Path, metavar="COSTS", help="a costs.json that --measure wrote")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512, 1024])
    parser.add_argument("--sequences", type=int, default=64, help="of each GPU, per step")
    parser.add_argument("--per-slot", type=int, help="tokens that a slot writes in a step; a quarter of --longest")
    parser.add_argument("--median", type=float, default=200)
    parser.add_argument("--sigma", type=float, default=1)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=33, help="tokens of a prompt")
    parser.add_argument("--sync", type=float, help="seconds that bringing the weights takes")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        compare(arguments.measure)
    else:
        predict(arguments)


if __name__ == "__main__":
    main()
