"""Runs of the real command, shared by the tests of this folder: each costs a start of torchrun and two engines."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from distill_cli.cli import run
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir


@dataclass(frozen=True)
class Finished:
    """One command line and what it left."""

    folder: Path
    """Where it was typed."""
    run: RunDir
    """The folder's latest run when the command ended: a later command does not change it."""
    status: int
    stdout: str
    stderr: str

    @property
    def metrics(self) -> list[dict]:
        return read_metrics(self.run.metrics)

    @property
    def config(self):
        return OmegaConf.load(self.run.config)


def distill(folder: Path, *argv: str, timeout_s: float = 300, **env: str) -> Finished:
    """`distill ARGV`, typed in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "distill_cli", *argv],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    latest = RunDir((folder / "runs" / "latest").resolve())
    return Finished(folder, latest, done.returncode, done.stdout, done.stderr)


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *argv: str) -> list[str]:
    """What `distill ARGV`, typed in `folder`, says in place of starting anything: without a process of its own."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    status = run(argv)
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, ""), (argv, printed)
    lines = printed.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread, and for long where other work shares the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


SHORT = (
    *("train.max_steps=3", "rollout.prompts_per_step=8", "train.global_batch_size=4", "train.micro_batch_tokens=128"),
    *("loss.temperature=1.5", "loss.kl_weight=0.3", "loss.topk=16", "train.weight_decay=0.3", "train.eps=1e-5"),
    *("train.warmup_updates=3", "train.max_grad_norm=0.7", "rollout.max_new_tokens=30", "eval.max_new_tokens=64"),
)
"""Three steps of two updates each, of several micro-batches; some answers are cut off.

What numbers depend on has no default's value, so that a key which does not arrive shows. A larger `eps` than the
default keeps noise in gradients near 0 from becoming steps of the whole learning rate.
"""


SECRETS = {
    "HF_TOKEN": "hf_" + "Planted" * 5,
    "MLFLOW_TRACKING_PASSWORD": "planted-pass-1",
    "MY_API_KEY": "planted-key-2",
    "WANDB_API_KEY": "planted-wandb-3" * 3,
}
"""What a user's shell may hold, and nothing that is written may."""


def files_with(secrets: Iterable[str], folder: Path) -> list[tuple[str, str]]:
    """Each of these that a file in a folder holds, and the file."""
    files = [(file, file.read_bytes()) for file in folder.rglob("*") if file.is_file()]
    assert files
    return [(secret, str(file)) for file, content in files for secret in secrets if secret.encode() in content]


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """It keeps its scores and has every tracker, which changes nothing else."""
    kept = ("eval.period=2", "eval.max_samples=40", "rollout.save_scores=true")
    tracked = ("tracker=[mlflow,wandb,tensorboard]", "tracker.wandb.mode=offline")
    return distill(tmp_path_factory.mktemp("one"), *SHORT, *kept, *tracked, **SECRETS)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    off = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")
    return distill(tmp_path_factory.mktemp("two"), *SHORT, *off, "cluster.ranks_per_node=2")


class Cluster:
    """A Slurm of four nodes on this machine (scripts/slurm_cluster.sh)."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env
        self.do("start")
        self.conf = self.do("env").stdout.strip().removeprefix("export SLURM_CONF=")

    def do(self, *words: str) -> subprocess.CompletedProcess:
        """The script with these arguments; what it says where it fails."""
        done = subprocess.run([CLUSTER_SCRIPT, *words], env=self._env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    def distill(self, folder: Path, *argv: str, **env: str) -> Finished:
        return distill(folder, *argv, SLURM_CONF=self.conf, **env)

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        env = {**os.environ, "SLURM_CONF": self.conf}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


CLUSTER_SCRIPT = str(Path(__file__).parent.parent.parent / "scripts" / "slurm_cluster.sh")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if shutil.which("slurmctld") is None or os.getuid() != 0:
        pytest.skip("needs root and Slurm's packages (scripts/slurm_cluster.sh install)")
    folder = tempfile.mkdtemp(prefix="slurm_")  # sockets need a short path
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] // 100 * 100
    env = {**os.environ, "SLURM_CLUSTER_DIR": folder, "SLURM_PORT_BASE": str(port), "SLURM_NODE_GPUS": "2"}
    try:
        yield Cluster(env)
    finally:
        subprocess.run([CLUSTER_SCRIPT, "purge"], env=env, check=True, timeout=120)
