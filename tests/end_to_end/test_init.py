"""`distill init`: a project that runs as it is, with tests that pass."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.cli import run
from tests.end_to_end.conftest import distill


@pytest.mark.slow
def test_a_new_project_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init", "project"]) == 0
    named = {Path(line) for line in capsys.readouterr().out.splitlines() if line.startswith("project")}
    assert {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()} == named
    project = tmp_path / "project"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, cwd=project, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    quick = ("train.max_steps=2", "eval.max_samples=16", "eval.at_start=false", "eval.teacher=false", "tracker=none")
    finished = distill(project, "--config-dir", "conf", "experiment=mine", *quick)
    assert finished.status == 0, finished.stderr
    assert "mine.divergence:hellinger" in finished.stdout
    assert 0 < finished.metrics[-1]["val/accuracy"] <= 1
    assert finished.metrics[-1]["train/loss"] > 0


def test_a_folder_with_files_stays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(["init", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
