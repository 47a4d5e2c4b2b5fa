"""Submitted runs, seen from their folders and from a cluster whose answers are handed in."""

import io
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from distill_cli.config.compose import compose
from distill_cli.folders.run_dir import JobEnd, RunDir, SubmittedJob, create, write_json
from distill_cli.jobs.submit import in_queue, job_outcome, lost_job_reason, submit, wait_for_sweep
from distill_cli.launch import base, slurm
from distill_cli.report.read import state_of


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the queue holds, by job."""
    queue: dict[str, str] = {}
    launcher = slurm.LAUNCHER
    monkeypatch.setattr(launcher, "is_installed", lambda: True)
    monkeypatch.setattr(launcher, "status", lambda ids: {one: queue[one] for one in ids if one in queue})
    monkeypatch.setattr(launcher, "end_state", lambda _job: "NODE_FAIL")
    monkeypatch.setattr(launcher, "submit", lambda _config, runs, *, folder, after: [job_of(run) for run in runs])
    assert base.launcher_of("slurm") is launcher
    return queue


def job_of(run: RunDir) -> SubmittedJob:
    return SubmittedJob("slurm", f"7_{run.path.name}", str(run.path / "log.out"))


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    return [create(tmp_path / "s" / name, command=["distill"]) for name in ("0", "1")]


def submitted(runs: list[RunDir], folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    submit(compose(["cluster=slurm"])[0].config, runs, folder=folder, console=console)
    return console.file.getvalue()


def test_submitting_prints_what_to_type(runs: list[RunDir], states: dict[str, str], tmp_path: Path) -> None:
    lines = dict(line.split(None, 1) for line in submitted(runs, tmp_path / "s").splitlines())
    assert lines["job"] == "7, an array of 2"
    assert (lines["queue"], lines["cancel"]) == ("squeue -r -j 7", "scancel 7")
    assert (lines["follow"], "output" in lines) == (f"distill report {tmp_path}/s", False)
    lines = dict(line.split(None, 1) for line in submitted(runs[:1], runs[0].path).splitlines())
    assert lines["follow"] == f"distill watch {runs[0].path}"
    assert lines["output"] == f"tail -F {runs[0].path}/log.out"


def test_the_queue_is_of_open_jobs(runs: list[RunDir], states: dict[str, str], tmp_path: Path) -> None:
    assert in_queue(runs) == {}
    submitted(runs, tmp_path / "s")
    states |= {"7_0": "RUNNING", "7_1": "PENDING"}
    assert in_queue(runs) == {runs[0].path: "job 7_0 (RUNNING)", runs[1].path: "job 7_1 (PENDING)"}
    assert state_of(runs[0]) == "waiting"
    write_json(runs[1].job_end, asdict(JobEnd("7_1", 0, None)))
    assert list(in_queue(runs)) == [runs[0].path]
    write_json(runs[1].job_end, asdict(JobEnd("6", 0, None)))  # of an earlier job
    assert len(in_queue(runs)) == 2


def test_a_lost_job_is_explained(runs: list[RunDir], states: dict[str, str], tmp_path: Path) -> None:
    run = runs[0]
    assert lost_job_reason(run) is None
    submitted(runs, tmp_path / "s")
    states["7_0"] = "RUNNING"
    assert lost_job_reason(run) is None
    del states["7_0"]
    assert lost_job_reason(run) == "job 7_0: NODE_FAIL"
    write_json(run.job_end, asdict(JobEnd("7_0", 143, "stopped by SIGTERM")))
    assert lost_job_reason(run) is None


def test_outcomes_come_from_run_or_cluster(runs: list[RunDir], states: dict[str, str], tmp_path: Path) -> None:
    run, job = runs[0], job_of(runs[0])
    status, reason = job_outcome(run, job)
    assert (status, reason.split(";")[0]) == (1, "NODE_FAIL")
    assert f"wrote nothing to {job.log}" in reason
    write_json(run.job_end, asdict(JobEnd("7_0", 2, "a bad key")))
    assert job_outcome(run, job) == (2, f"a bad key; output: {job.log}")
    write_json(run.outcome, {"state": "finished"})
    write_json(run.job_end, asdict(JobEnd("7_0", 0, None)))
    assert job_outcome(run, job) == (0, "finished")


def test_waiting_ends_with_the_last_job(
    runs: list[RunDir], states: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    states["7_1"] = "RUNNING"
    monkeypatch.setattr("time.sleep", lambda _seconds: states.clear())
    write_json(runs[0].job_end, asdict(JobEnd("7_0", 0, None)))
    write_json(runs[0].outcome, {"state": "finished"})
    console = Console(file=io.StringIO(), width=200)
    assert wait_for_sweep(runs, [job_of(run) for run in runs], console=console) == 1
    assert [line[:11] for line in console.file.getvalue().splitlines()] == ["1/2  0: fin", "2/2  1: NOD"]
