"""Kills a run at random instants until it has finished, and compares what it comes to with a run that was left alone.

    python scripts/torture.py --kills 50 --ranks 2

Each kill picks a victim and a moment. A rank, torchrun or the launcher is killed (SIGKILL), a rank hangs (SIGSTOP), or
the run is asked to stop (SIGTERM); at any time, while a checkpoint is written, during a sync, or during a validation.
Where the launcher is gone, `distill resume` goes on. At the end the student's parameters must be equal bit for bit,
every step must be once in metrics.jsonl and in MLflow, and no process and no shared memory may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from mlflow import MlflowClient
from safetensors.torch import load_file

VICTIMS = ("rank", "launcher", "agent", "hang", "stop")
MOMENTS = ("any time", "checkpoint", "sync", "eval")
SETTINGS = (
    *("experiment=quick", "run.name=run", "rollout.prompts_per_step=8", "train.global_batch_size=8"),
    *("eval.period=5", "eval.max_samples=16", "eval.teacher=false", "checkpoint.period=2"),
    *("cluster.max_restarts=1000", "cluster.hang_timeout_s=15", "cluster.grace_s=30"),
)


@dataclass
class Kill:
    """One attempt on the run's life, and what came of it."""

    victim: str
    moment: str
    step: int
    """The last step that was recorded."""
    lost_steps: int = 0
    """Recorded steps that had to be done again."""
    seconds: float = 0.0
    """From the kill until the run was beyond that step."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    settings = [*SETTINGS, f"train.max_steps={given.steps}", f"cluster.ranks_per_node={given.ranks}"]
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    calm, wild = folder / "calm", folder / "wild"
    shm = set(os.listdir("/dev/shm"))
    begin = time.monotonic()
    start(calm, *settings).wait()
    calm_s = time.monotonic() - begin
    begin = time.monotonic()
    kills = torture(wild, settings, num_kills=given.kills, rng=random.Random(given.seed))
    print_table(kills, calm_s=calm_s, wild_s=time.monotonic() - begin)
    problems = compare(calm / "runs/run", wild / "runs/run", num_steps=given.steps)
    problems += [f"/dev/shm/{name} is left" for name in set(os.listdir("/dev/shm")) - shm]
    problems += [f"process {process.pid} is left: {process.cmdline()}" for process in of_folder(folder)]
    for problem in problems:
        print(f"wrong: {problem}")
    if not problems:
        print("the same parameters bit for bit; every step once in metrics.jsonl and in MLflow; nothing left behind")
        shutil.rmtree(folder)
    return bool(problems)


def start(folder: Path, *argv: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "distill_cli", *argv], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )


def torture(folder: Path, settings: list[str], *, num_kills: int, rng: random.Random) -> list[Kill]:
    process, kills = start(folder, *settings), []
    run = folder / "runs/run"
    while process.poll() is None or len(kills) < num_kills:
        if process.poll() is not None:  # the launcher is gone, by our hand or by its own end
            if finished(run):
                break
            process = start(folder, "resume", "runs/run") if run.exists() else start(folder, *settings)
        if len(kills) == num_kills:
            process.wait()
            continue
        kill = strike(process, run, rng=rng)
        if kill is not None:
            kills.append(kill)
            print(f"{len(kills):3} {kill.victim:9} {kill.moment:11} at step {kill.step}", flush=True)
            begin = time.monotonic()
            process = survive(process, folder, settings, kill)
            kill.seconds = time.monotonic() - begin
    return kills


def strike(process: subprocess.Popen, run: Path, *, rng: random.Random) -> Kill | None:
    """Waits for the moment, and kills; None where the run ended before it came."""
    victim, moment = rng.choice(VICTIMS), rng.choice(MOMENTS)
    if not wait_for(process, lambda: arrived(run, moment), poll_s=0.002):
        return None
    time.sleep(rng.uniform(0, 0.05) if moment != "any time" else rng.uniform(0, 8))
    kill = Kill(victim, moment, last_step(run))
    try:
        hit(process, victim, rng)
    except psutil.NoSuchProcess:
        return None
    return kill


def hit(process: subprocess.Popen, victim: str, rng: random.Random) -> None:
    launcher = psutil.Process(process.pid)
    if victim == "launcher":
        launcher.kill()
        process.wait()
        return
    if victim == "stop":
        launcher.terminate()
        process.wait()
        return
    agents = launcher.children()
    if not agents:
        raise psutil.NoSuchProcess(process.pid)
    if victim == "agent":
        agents[0].kill()
        return
    ranks = agents[0].children()
    if not ranks:
        raise psutil.NoSuchProcess(process.pid)
    rng.choice(ranks).send_signal(signal.SIGKILL if victim == "rank" else signal.SIGSTOP)


def survive(process: subprocess.Popen, folder: Path, settings: list[str], kill: Kill) -> subprocess.Popen:
    """Until the run is beyond the step at which it was hit; counts what it had to do again."""
    run, lowest = folder / "runs/run", kill.step
    while True:
        if process.poll() is not None:
            if finished(run):
                break
            process = (
                start(folder, "resume", "runs/run") if (run / "config.yaml").exists() else start(folder, *settings)
            )
        step = last_step(run)
        lowest = min(lowest, step)
        if step > kill.step:
            break
        time.sleep(0.02)
    kill.lost_steps = kill.step - lowest
    return process


def arrived(run: Path, moment: str) -> bool:
    if moment == "any time":
        return True
    if moment == "checkpoint":
        return any((run / "checkpoints").glob(".step_*"))
    stages = sorted(run.glob("logs/attempt_*/heartbeat"), key=lambda file: file.stat().st_mtime)
    return bool(stages) and stages[-1].read_text() == moment


def wait_for(process: subprocess.Popen, condition, *, poll_s: float) -> bool:
    while process.poll() is None:
        if condition():
            return True
        time.sleep(poll_s)
    return False


def finished(run: Path) -> bool:
    outcome = run / "outcome.json"
    return outcome.exists() and json.loads(outcome.read_text())["state"] == "finished"


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return -1
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else -1


def print_table(kills: list[Kill], *, calm_s: float, wild_s: float) -> None:
    print(f"\n{'victim':9} {'moment':11} kills  lost steps (mean, most)  seconds lost (mean, most)")
    for victim in VICTIMS:
        for moment in MOMENTS:
            of_kind = [kill for kill in kills if (kill.victim, kill.moment) == (victim, moment)]
            if of_kind:
                steps, seconds = [k.lost_steps for k in of_kind], [k.seconds for k in of_kind]
                print(
                    f"{victim:9} {moment:11} {len(of_kind):5}  {sum(steps) / len(steps):10.1f} {max(steps):6}"
                    f"  {sum(seconds) / len(seconds):15.1f} {max(seconds):8.1f}"
                )
    print(f"{len(kills)} kills; {calm_s:.0f} s left alone, {wild_s:.0f} s under torture")


def compare(calm: Path, wild: Path, *, num_steps: int) -> list[str]:
    """What differs between the two runs' ends, in words."""
    problems = []
    ours, theirs = (load_file(run / "student/model.safetensors") for run in (wild, calm))
    problems += [f"{name} differs" for name in ours.keys() | theirs.keys() if not ours[name].equal(theirs[name])]
    rows = [json.loads(line) for line in (wild / "metrics.jsonl").read_text().splitlines()]
    if [row["step"] for row in rows] != list(range(num_steps + 1)):
        problems.append(f"metrics.jsonl has steps {[row['step'] for row in rows]}")
    expected = [json.loads(line) for line in (calm / "metrics.jsonl").read_text().splitlines()]
    for row, other in zip(rows, expected, strict=False):
        for key in row.keys() | other.keys():
            if not key.startswith(("time", "perf")) and row.get(key) != other.get(key):
                problems.append(f"step {row['step']}: {key} is {row.get(key)}, was {other.get(key)}")
    client = MlflowClient(tracking_uri=f"sqlite:///{wild.parent / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    if len(runs) != 1:
        problems.append(f"MLflow has {len(runs)} runs")
    for found in runs:
        steps = Counter(metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss"))
        if steps != Counter(range(1, num_steps + 1)):
            problems.append(f"MLflow has steps {sorted(steps.items())}")
    return problems


def of_folder(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
    ]


if __name__ == "__main__":
    sys.exit(main())
