import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill_cli.engines.sampler import VllmSampler
from tests.conftest import shared_memory_left

from .reference import ask, make_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["both over two ranks, tied", "sampler over two, untied"])
@pytest.mark.exhaustive
def test_two_ranks_answer_as_one(scorer, sampler, student_settings, tied, tmp_path):
    """Also a sync from FSDP's shards into a model that is cut otherwise; untied beside a companion of one rank."""
    path = student_settings.path
    if not tied:
        path = str(tmp_path / "student")
        make_model(path, hidden_size=128, seed=1, tied=False)
        sampler = VllmSampler(replace(student_settings, path=path))
    torch.save(ask(sampler, scorer), tmp_path / "expected")
    if not tied:
        sampler.close()
    sizes = ("2", "2") if tied else ("2", "1")
    left_before = shared_memory_left()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.engines.two_ranks", path, scorer.settings.path, tmp_path / "expected", *sizes],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert shared_memory_left() <= left_before
    assert all(f"rank {rank} done" in result.stdout for rank in range(2))
