"""Which ranks torchrun's failures name as killed; test_local.py kills one."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_cli.errors import DistillError, Killed
from distill_cli.folders.run_dir import RunDir, create, write_json
from distill_cli.launch import local
from distill_cli.launch.local import record_killed


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return create(tmp_path / "run", command=["distill"])


def failed(run: RunDir, *ends: tuple[int, int]) -> DistillError:
    """Return the launcher's error where the ranks ended with these statuses at these times."""
    record_killed({rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, (code, at) in enumerate(ends)}, run)
    return local.failure(run, status=1)


def test_a_killed_rank_is_named(run: RunDir) -> None:
    write_json(run.rank_error(0), {"time": 5.0, "kind": "RuntimeError", "message": "connection closed"})
    error = failed(run, (1, 5), (-signal.SIGKILL, 6))
    assert isinstance(error, Killed)
    assert str(error).startswith("rank 1 was killed by SIGKILL")


@pytest.mark.parametrize("end", [(-signal.SIGTERM, 5), (-signal.SIGKILL, 35)])
def test_torchrun_s_victims_are_not_named(run: RunDir, end: tuple[int, int]) -> None:
    write_json(run.rank_error(1), {"time": 5.0, "kind": "ValueError", "message": "ValueError: bad"})
    error = failed(run, end, (1, 5))
    assert str(error).startswith("rank 1: ValueError: bad")
