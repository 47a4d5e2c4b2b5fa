"""Runs of the real command, shared by the tests of this folder: each costs a start of torchrun and two engines."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill_cli.rundir import RunDir
from distill_cli.track.recorder import read_metrics


@dataclass(frozen=True)
class Finished:
    """One command line and what it left."""

    folder: Path
    """Where it was typed."""
    status: int
    stdout: str
    stderr: str

    @property
    def run(self) -> RunDir:
        return RunDir((self.folder / "runs" / "latest").resolve())

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
    return Finished(folder, done.returncode, done.stdout, done.stderr)


SHORT = ("train.max_steps=3", "rollout.prompts_per_step=8", "train.global_batch_size=4", "train.micro_batch_tokens=128")
"""Three steps of two updates each, of several micro-batches."""


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return distill(tmp_path_factory.mktemp("one"), *SHORT, "eval.period=2", "eval.max_samples=40")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    off = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")
    return distill(tmp_path_factory.mktemp("two"), *SHORT, *off, "cluster.ranks_per_node=2")
