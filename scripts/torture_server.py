"""Kill a run's scoring server at random moments, and compare the student with that of an undisturbed run.

    python scripts/torture_server.py --kills 20

A server of the embedded teacher is killed (SIGKILL to it and its engines, or to an engine alone) at a random moment and
started again after a random pause, while a run of the embedded pair trains with it as its teacher. Batches are fixed
(`distill serve --fixed-batches`), so the student's parameters must be equal bit for bit. Print one line per kill, and
whether the two runs are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

SETTINGS = (
    *("rollout.prompts_per_step=16", "train.global_batch_size=16", "eval.period=0", "eval.at_start=false"),
    *(
        "eval.at_end=false",
        "eval.record_samples=0",
        "tracker=none",
        "cluster.ranks_per_node=2",
        "train.schedule=constant",
    ),
)
SECONDS_BETWEEN = 6.0
"""Mean seconds of work between two kills."""


class Server:
    """A scoring server that is killed and started again at one port."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = (folder / "server.log").open("ab")
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "distill_cli", "serve", "--fixed-batches", f"--port={self.port}"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def wait_ready(self) -> None:
        """Return when it can score; start it again if it has ended, as after the death of an engine."""
        while True:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                if self._process.poll() is not None:
                    self.start()
                time.sleep(0.1)

    def kill(self, *, engine_alone: bool) -> None:
        engines = psutil.Process(self._process.pid).children(recursive=True)
        for process in [*([] if engine_alone else [psutil.Process(self._process.pid)]), *engines]:
            process.send_signal(signal.SIGKILL)
        self._process.wait(60)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="distill-torture-") as name:
        folder = Path(name)
        server = Server(folder)
        server.wait_ready()
        num_steps = torture(server, folder, rng, num_kills=arguments.kills)
        undisturbed = start(server, folder, "undisturbed", num_steps)
        if undisturbed.wait() != 0:
            sys.exit("the undisturbed run failed")
        server.stop()
        students = {name: digest(folder / "runs" / name) for name in ("killed", "undisturbed")}
        losses = {name: losses_of(folder / "runs" / name) for name in students}
    same = len(set(students.values())) == 1 and losses["killed"] == losses["undisturbed"]
    print(
        f"{arguments.kills} kills in {num_steps} steps: the student is {'bit for bit the same' if same else 'ANOTHER'}"
    )
    sys.exit(0 if same else 1)


def torture(server: Server, folder: Path, rng: random.Random, *, num_kills: int) -> int:
    """Train while the server is killed, and stop the run after the last kill; return the steps that it took."""
    run = start(server, folder, "killed", 100_000)
    metrics = folder / "runs/killed/metrics.jsonl"
    while not metrics.exists() or not losses_of(metrics.parent):
        time.sleep(0.2)
        if run.poll() is not None:
            sys.exit("the run ended before its first step")
    for number in range(1, num_kills + 1):
        time.sleep(rng.uniform(0, 2 * SECONDS_BETWEEN))
        before, engine_alone = len(losses_of(metrics.parent)), rng.random() < 0.3
        server.kill(engine_alone=engine_alone)
        time.sleep(rng.uniform(0, 3))
        server.start()
        server.wait_ready()
        while len(losses_of(metrics.parent)) <= before:
            if run.poll() is not None:
                sys.exit(f"the run ended after kill {number}, with status {run.returncode}")
            time.sleep(0.1)
        print(f"kill {number:2} after step {before}: {'an engine' if engine_alone else 'the server'}", flush=True)
    run.terminate()
    run.wait()
    num_steps = len(losses_of(metrics.parent)) + 2
    command = [sys.executable, "-m", "distill_cli", "resume", "runs/killed", f"train.max_steps={num_steps}"]
    if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit("the run could not be resumed")
    return num_steps


def start(server: Server, folder: Path, name: str, num_steps: int) -> subprocess.Popen[bytes]:
    """Start a run with the server as its teacher."""
    steps = (f"train.max_steps={num_steps}", "train.max_epochs=100000")
    argv = [*SETTINGS, *steps, f"model.teacher.url={server.address}", f"run.name={name}"]
    log = (folder / f"{name}.log").open("ab")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "distill_cli", *argv], cwd=folder, stdout=log, stderr=log, env=env)


def losses_of(run: Path) -> list[float]:
    """Return the losses of a run's steps so far."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["train/loss"] for row in rows if row["step"] > 0]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "student/model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
