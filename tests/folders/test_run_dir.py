"""Names of run folders; no folder is used twice."""

import os
from pathlib import Path

import pytest

from distill_cli.errors import ConfigError
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir


def test_sweep_runs_are_named_by_overrides() -> None:
    assert run_dir.element_name(1, ["loss.topk=32", "loss.kl_weight=0.3"]) == "1_topk=32,kl_weight=0.3"
    assert run_dir.element_name(0, ["model=a/b c"]) == "0_model=a_b_c"


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    run = run_dir.create(tmp_path / "a", command=["distill", "x=a b"])
    assert (run.path / "command.txt").read_text() == "distill 'x=a b'\n"
    with pytest.raises(ConfigError, match="exists already"):
        run_dir.create(tmp_path / "a", command=[])
    assert run_dir.free_name(tmp_path, "a") == "a_2"


def test_latest_points_to_the_newest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_dir.create(tmp_path / name, command=[])
        run_dir.point_latest(tmp_path, name)
    assert (tmp_path / "latest").resolve() == tmp_path / "b"


def test_a_held_folder_names_its_holder(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock(), pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "), run.lock():
        pass
    with run.lock():  # free again
        pass


def test_an_attempt_has_its_own_logs(tmp_path: Path) -> None:
    first = RunDir(tmp_path).next_attempt()
    second = first.next_attempt()
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.logs != second.logs
    assert second.logs.is_dir()
