"""The jobs of a run's teachers, with a cluster whose answers are handed in."""

import io
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.engines.server_files import Server, read_servers, server_file, write_server
from distill_cli.engines.wire import TOKEN
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.run_dir import JobEnd, RunDir, SubmittedJob, create, read_json, write_json
from distill_cli.jobs import teacher_jobs
from distill_cli.jobs.run_jobs import shared_teacher_problems
from distill_cli.jobs.submit import submit
from distill_cli.jobs.teacher_jobs import end_teachers, environment_of_others, kept, submit_teachers
from distill_cli.jobs.teacher_node import UNSUBMITTED_S, has_ended, is_replaced, server_config
from distill_cli.launch import base, slurm
from distill_cli.launch.base import Place
from distill_cli.terminal.console import Console


class Queue:
    """What the cluster has, and what it was asked to do."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.after: list[str] = []
        self.refuses = self.is_silent = False
        self.num_submitted = 0

    def submit_teacher(self, _config: Config, name: str, run: RunDir) -> SubmittedJob:
        self.num_submitted += 1
        self.jobs.append(f"{self.num_submitted}")
        return SubmittedJob("slurm", f"{self.num_submitted}", str(run.path / f"{name}.out"))

    def submit(self, _config: Config, runs: list[RunDir], *, folder: Path, after: list[str]) -> list[SubmittedJob]:
        if self.refuses:
            raise ConfigError("Slurm refuses the job: no")
        assert not any(run.job.exists() for run in runs)
        self.after = after
        return [SubmittedJob("slurm", "100", str(folder / "log.out")) for _ in runs]

    def status(self, ids: list[str]) -> dict[str, str]:
        if self.is_silent:
            raise DistillError("squeue does not answer")
        return {one: "RUNNING" for one in ids if one in self.jobs}

    def cancel(self, ids: list[str]) -> None:
        self.jobs = [one for one in self.jobs if one not in ids]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    for name in ("submit", "submit_teacher", "status", "cancel"):
        monkeypatch.setattr(slurm.LAUNCHER, name, getattr(queue, name))
    monkeypatch.setattr(slurm.LAUNCHER, "is_installed", lambda: True)
    monkeypatch.setattr(slurm.LAUNCHER, "end_state", lambda _job: "FAILED")
    monkeypatch.setenv(TOKEN, "")
    return queue


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return create(tmp_path / "r", command=["distill"])


def config_of(*overrides: str) -> Config:
    return compose(["cluster=slurm", "model.teacher.nodes=1", *overrides])[0].config


def printed() -> Console:
    return Console(file=io.StringIO(), width=300)


def test_the_run_waits_for_its_teacher(queue: Queue, run: RunDir) -> None:
    console = printed()
    submit(config_of(), [run], folder=run.path, console=console)
    assert queue.after == ["1"]
    assert run.teacher_jobs()["teacher"].job_id == "1"
    assert "teacher  job 1" in console.file.getvalue()
    token = os.environ[TOKEN]
    assert len(token) == 64
    assert not [file for file in run.path.rglob("*") if file.is_file() and token in file.read_text()]
    submit(config_of(), [run], folder=run.path, console=console)
    assert (queue.jobs, os.environ[TOKEN]) == (["2"], token)  # the first was ended


def test_a_refused_run_leaves_no_teacher(queue: Queue, run: RunDir) -> None:
    before = asdict(SubmittedJob("slurm", "99", "log.out"))
    write_json(run.job, before)
    queue.refuses = True
    with pytest.raises(ConfigError, match="refuses"):
        submit(config_of(), [run], folder=run.path, console=printed())
    assert (queue.num_submitted, queue.jobs, run.teacher_jobs()) == (1, [], {})
    assert read_json(run.job) == before


def test_ended_teachers_leave_nothing(queue: Queue, run: RunDir) -> None:
    submit_teachers(config_of(), run)
    write_server(server_file(run.servers("teacher"), 0), Server("https://a:1", "pem"))
    assert [server.address for server in read_servers(run.servers("teacher"))] == ["https://a:1"]
    server_file(run.servers("teacher"), 1).write_text("half")
    assert len(read_servers(run.servers("teacher"))) == 1
    end_teachers(run)
    assert (queue.jobs, read_servers(run.servers("teacher")), run.teacher_jobs()) == ([], [], {})
    end_teachers(run)


def test_an_ended_job_is_replaced(queue: Queue, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    config, console, looks = config_of("cluster.max_restarts=2"), printed(), iter(range(5))
    submit_teachers(config, run)

    class Waits:
        """The end of the run after five looks, before each of which the job ends."""

        def wait(self, _seconds: float) -> bool:
            queue.jobs.clear()
            return next(looks, None) is None

    monkeypatch.setattr(teacher_jobs, "submit_again", lambda run, name: teacher_jobs.submit_teacher(config, run, name))
    queue.jobs.clear()
    teacher_jobs._keep(run, config, Waits(), console)
    assert queue.num_submitted == 3
    assert run.teacher_jobs()["teacher"].job_id == "3"
    text = console.file.getvalue()
    assert text.count("another one is submitted") == 2
    assert text.count("; cluster.max_restarts=2") == 1


def test_nothing_is_kept_outside_jobs(queue: Queue, run: RunDir) -> None:
    with kept(run, config_of(), base.ALONE, console=printed()):
        pass
    with kept(run, compose(["cluster=slurm"])[0].config, Place("7"), console=printed()):
        pass
    assert queue.num_submitted == 0


def test_servers_know_when_their_run_ends(queue: Queue, run: RunDir) -> None:
    launcher = slurm.LAUNCHER
    assert not has_ended(run, launcher, began=1e12)
    assert has_ended(run, launcher, began=-UNSUBMITTED_S)
    write_json(run.job, asdict(SubmittedJob("slurm", "100", "log.out")))
    assert has_ended(run, launcher, began=1e12)
    queue.jobs = ["100"]
    assert not has_ended(run, launcher, began=0)
    queue.jobs, queue.is_silent = [], True
    assert not has_ended(run, launcher, began=0)
    write_json(run.job_end, asdict(JobEnd("100", 0, None)))
    assert has_ended(run, launcher, began=0)


def test_replaced_servers_notice_it(queue: Queue, run: RunDir) -> None:
    assert not is_replaced(run, "teacher", Place("1"))
    submit_teachers(config_of(), run)
    assert not is_replaced(run, "teacher", Place("1"))
    assert is_replaced(run, "teacher", Place("0"))


def test_a_job_s_variables_stay() -> None:
    env = {"SLURM_JOB_ID": "1", "SLURM_CONF": "c", "SUBMITIT_X": "1", "CUDA_VISIBLE_DEVICES": "0", TOKEN: "t", "A": "b"}
    assert environment_of_others(env) == {"SLURM_CONF": "c", TOKEN: "t", "A": "b"}


def test_a_server_reads_its_teacher_alone(run: RunDir) -> None:
    made = server_config(run, "teacher", config_of(), max_model_len=99)
    assert (made.cluster.launcher, made.cluster.nodes, made.model.teacher.nodes) == ("local", 1, 0)
    assert (made.engine.teacher.max_model_len, made.engine.teacher.gpu_memory_utilization) == (99, 0.9)
    run.command.write_text("distill engine.teacher.gpu_memory_utilization=0.5\n")
    job = config_of("engine.teacher.gpu_memory_utilization=0.5")
    made = server_config(run, "teacher", job, max_model_len=99)
    assert made.engine.teacher.gpu_memory_utilization == 0.5


def test_sweeps_share_no_teacher() -> None:
    (problem,) = shared_teacher_problems(config_of())
    assert problem.startswith("model.teacher.nodes=1: the runs of a sweep cannot share a teacher's job; ")
