"""Kill a run fifty times at random moments, and compare its result with that of an uninterrupted run.

    python scripts/torture.py --kills 50 [OVERRIDES ...]

Each kill has a victim and a moment. A rank, an engine's process, torchrun or the launcher is killed (SIGKILL), a rank
hangs (SIGSTOP), or the run receives a stop request (SIGTERM, SIGUSR1): at any time, while a checkpoint is written,
during a sync, a validation, or the start after an earlier kill. If the launcher is gone, `distill resume` continues the
run.

The run has two parts: first one rank with both engines in its process, then two ranks with the teacher over both, whose
engine then has a process of its own for each rank. At the end the student's parameters must be equal bit for bit, every
step must be once in metrics.jsonl and in MLflow, and no process and no shared memory may be left.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from mlflow import MlflowClient
from safetensors.torch import load_file

VICTIMS = ("rank", "launcher", "torchrun", "stop")
SLOW_VICTIM = "hang"
"""Is detected after cluster.hang_timeout_s."""
MOMENTS = ("any time", "checkpoint", "sync", "eval", "start", "start")
SETTINGS = (
    *("model=tiny", "run.name=run", "rollout.prompts_per_step=8", "train.global_batch_size=8"),
    *("eval.period=5", "eval.max_samples=16", "eval.teacher=false", "eval.at_end=false", "checkpoint.period=2"),
    *("cluster.max_restarts=1000", "cluster.grace_s=60", "train.schedule=constant"),
)
OWN_ENGINES = ("cluster.ranks_per_node=2", "engine.teacher.tensor_parallel=2")
MARK = "DISTILL_TORTURE"
"""Environment variable of all processes that this script starts; its value is the script's folder."""


@dataclass
class Kill:
    """A kill and its cost."""

    victim: str
    moment: str
    step: int
    """The last step that was recorded."""
    lowest: int
    """The last recorded step after the next attempt had removed those beyond its checkpoint."""
    at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """From the kill until the run was beyond that step."""

    @property
    def lost_steps(self) -> int:
        """Recorded steps that had to be repeated."""
        return self.step - self.lowest


class Wild:
    """The run that is killed, and its launcher's process."""

    def __init__(
        self, folder: Path, *, rng: random.Random, hang_timeout_s: float, settings: Sequence[str] = SETTINGS
    ) -> None:
        self.folder, self.run, self.rng = folder, folder / "runs/run", rng
        self.kills: list[Kill] = []
        self._pending: list[Kill] = []
        self._settings = [*settings, f"cluster.hang_timeout_s={hang_timeout_s:g}"]
        self._overrides: list[str] = []
        self._process = self._go_on()

    def _go_on(self) -> subprocess.Popen:
        """Start the run, or resume it."""
        if not (self.run / "config.yaml").exists():
            return start(self.folder, *self._settings, *self._overrides)
        return start(self.folder, "resume", "runs/run", *self._overrides)

    def torture(self, num_kills: int, *, minutes: float, victims: Sequence[str], overrides: Sequence[str] = ()) -> int:
        """Kill the run that often, or for that long, then stop it; return its last checkpoint's step."""
        end = time.monotonic() + 60 * minutes
        self._overrides = [*overrides, "train.max_steps=100000"]
        target, plan = len(self.kills) + num_kills, self._draw(victims)
        while len(self.kills) < target or self._pending:
            self._look()
            if time.monotonic() > end:
                target = 0
            if len(self.kills) < target and self._is_due(plan):
                if self._strike(plan):
                    print_kill(len(self.kills), self.kills[-1])
                plan = self._draw(victims)
            time.sleep(0.002)
        self._process.terminate()
        self._process.wait()
        return max(int(path.name.removeprefix("step_")) for path in self.run.glob("checkpoints/step_*"))

    def finish(self, num_steps: int) -> None:
        """Resume the run and wait for its end."""
        self._overrides = [*self._overrides[:-1], f"train.max_steps={num_steps}"]
        self._process = self._go_on()
        self._process.wait()

    def _look(self) -> None:
        """Restart a dead launcher, and close the kills whose step the run has passed."""
        if self._process.poll() is not None:
            self._process = self._go_on()
        step = last_step(self.run)
        for kill in list(self._pending):
            kill.lowest = min(kill.lowest, step)
            if step > kill.step:
                kill.seconds = time.monotonic() - kill.at
                self._pending.remove(kill)

    def _draw(self, victims: Sequence[str]) -> tuple[str, str, float]:
        """Draw a victim, a moment, and the earliest time of the kill."""
        victim = SLOW_VICTIM if self.rng.random() < 0.06 else self.rng.choice(victims)
        moment = self.rng.choice(MOMENTS)
        if victim == "stop" and moment == "start":
            moment = "any time"  # there is nothing to save yet
        delay_s = {"any time": 4.0, "start": 12.0}.get(moment, 0.05)
        return victim, moment, time.monotonic() + self.rng.uniform(0, delay_s)

    def _is_due(self, plan: tuple[str, str, float]) -> bool:
        _, moment, at = plan
        if moment == "start":
            return time.monotonic() > at and (is_starting(self.run) or not self._pending)
        if self._pending or last_step(self.run) < 0:
            return False
        if moment == "any time":
            return time.monotonic() > at
        if moment == "checkpoint":
            return any((self.run / "checkpoints").glob(".step_*"))
        return stage(self.run) == moment

    def _strike(self, plan: tuple[str, str, float]) -> bool:
        """Kill the victim; return False if it does not exist at the moment."""
        victim, moment, _ = plan
        if moment == "start" and not is_starting(self.run):
            return False  # it is up again already
        if moment not in ("any time", "start"):
            time.sleep(self.rng.uniform(0, 0.05))
        step = last_step(self.run)
        try:
            self._hit(victim)
        except (psutil.NoSuchProcess, IndexError):
            return False
        kill = Kill(victim, moment, step, lowest=step)
        self.kills.append(kill)
        self._pending.append(kill)
        return True

    def _hit(self, victim: str) -> None:
        launcher = psutil.Process(self._process.pid)
        if victim == "launcher":
            launcher.kill()
            self._process.wait()
            return
        if victim == "stop":
            launcher.send_signal(self.rng.choice((signal.SIGTERM, signal.SIGUSR1)))
            self._process.wait()
            return
        agent = launcher.children()[0]
        if victim == "torchrun":
            agent.kill()
            return
        rank = self.rng.choice(agent.children())
        if victim == "engine":
            rank.children()[0].kill()
            return
        rank.send_signal(signal.SIGKILL if victim == "rank" else signal.SIGSTOP)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=50, help="number of kills in both parts together")
    arguments.add_argument("--own-engines", type=int, default=10, help="number of kills in the second part")
    arguments.add_argument("--hang-timeout", type=float, default=60, help="cluster.hang_timeout_s; longer than a start")
    arguments.add_argument("--minutes", type=float, default=120, help="no further kills after this time")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("overrides", nargs="*", help="more keys of the run")
    given = arguments.parse_args()
    settings = (*SETTINGS, *given.overrides)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    os.environ[MARK] = str(folder)
    shm, begin = set(os.listdir("/dev/shm")), time.monotonic()
    wild = Wild(folder / "wild", rng=random.Random(given.seed), hang_timeout_s=given.hang_timeout, settings=settings)
    share = given.own_engines / given.kills
    first = wild.torture(given.kills - given.own_engines, minutes=given.minutes * (1 - share), victims=VICTIMS)
    victims = (*VICTIMS, "engine", "engine", "engine")
    last = wild.torture(given.own_engines, minutes=given.minutes * share, victims=victims, overrides=OWN_ENGINES)
    wild.finish(last + 3)
    wild_s, begin = time.monotonic() - begin, time.monotonic()
    calm = folder / "calm"
    start(calm, *settings, f"train.max_steps={first}").wait()
    start(calm, "resume", "runs/run", *OWN_ENGINES, f"train.max_steps={last + 3}").wait()
    print_table(wild.kills, num_steps=last + 3, calm_s=time.monotonic() - begin, wild_s=wild_s)
    problems = compare(calm / "runs/run", wild.run, num_steps=last + 3)
    problems += [f"/dev/shm/{name} is left" for name in left_in_shm(shm)]
    problems += [f"process {process.pid} is left: {process.cmdline()}" for process in left_processes(folder)]
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


def stage(run: Path) -> str | None:
    """Return the current stage of the newest attempt; None while it starts."""
    attempts = sorted(run.glob("logs/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    heartbeat = attempts[-1] / "heartbeat" if attempts else None
    words = heartbeat.read_text().split() if heartbeat and heartbeat.exists() else []
    return words[0] if words else None


def is_starting(run: Path) -> bool:
    return run.exists() and stage(run) is None


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return -1
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else -1


def print_kill(number: int, kill: Kill) -> None:
    print(f"{number:3} {kill.victim:9} {kill.moment:11} at step {kill.step}", flush=True)


def print_table(kills: list[Kill], *, num_steps: int, calm_s: float, wild_s: float) -> None:
    print(f"\n{'kill':>4} {'victim':9} {'moment':11} {'at step':>7} {'lost steps':>10} {'lost seconds':>12}")
    for number, kill in enumerate(kills, start=1):
        print(f"{number:4} {kill.victim:9} {kill.moment:11} {kill.step:7} {kill.lost_steps:10} {kill.seconds:12.1f}")
    print(f"\n{'victim or moment':18} kills  lost steps (mean, most)  lost seconds (mean, most)")
    for name in dict.fromkeys((*VICTIMS, "engine", SLOW_VICTIM, *MOMENTS)):
        of_kind = [kill for kill in kills if name in (kill.victim, kill.moment)]
        if of_kind:
            steps, seconds = [k.lost_steps for k in of_kind], [k.seconds for k in of_kind]
            print(
                f"{name:18} {len(of_kind):5}  {sum(steps) / len(steps):10.1f} {max(steps):6}"
                f"  {sum(seconds) / len(seconds):15.1f} {max(seconds):8.1f}"
            )
    print(f"{len(kills)} kills, {num_steps} steps; {calm_s:.0f} s uninterrupted, {wild_s:.0f} s with kills")


def compare(calm: Path, wild: Path, *, num_steps: int) -> list[str]:
    """Return a line for each difference between the results of the two runs."""
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


def left_in_shm(before: set[str]) -> Iterator[str]:
    """Return new shared memory that no process maps; other programs may use theirs meanwhile."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:
            continue  # it has ended
    return (name for name in set(os.listdir("/dev/shm")) - before if f"/dev/shm/{name}" not in mapped)


def left_processes(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                yield process
        except psutil.Error:
            continue


if __name__ == "__main__":
    sys.exit(main())
