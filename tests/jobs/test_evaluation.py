"""How `distill eval` starts the ranks that answer: in the environment that cluster.* describes."""

import sys
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.errors import DistillError
from distill_cli.jobs.evaluation import Contender, answer
from distill_cli.jobs.preflight import preflight
from distill_cli.launch import local

RANK = "import os, sys; open(sys.argv[1], 'w').write(os.environ['TMPDIR'] + ' ' + os.environ['A']); sys.exit(1)"


def test_ranks_get_the_cluster_s_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = [sys.executable, "-c", RANK, str(tmp_path / "environment")]
    monkeypatch.setattr(local, "command", lambda run, **_: rank)
    (job,) = compose([f"cluster.tmp_dir={tmp_path}/node", "+cluster.env.A=1"])
    found = preflight(job.config)
    with pytest.raises(DistillError):
        answer(Contender("student", job.config, "student"), found, tmp_path)
    assert (tmp_path / "environment").read_text() == f"{tmp_path}/node 1"
