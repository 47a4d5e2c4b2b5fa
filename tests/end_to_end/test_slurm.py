"""Runs on a real Slurm of four nodes, against the same runs without it."""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from distill_cli.engines.server_files import read_servers
from distill_cli.engines.wire import TOKEN
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, SweepDir
from tests.end_to_end.conftest import SECRETS, SHORT, Cluster, Finished, files_with, refused
from tests.track.server import free_port, start_server, stop

pytestmark = pytest.mark.slurm
NO_EVAL = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")


@pytest.mark.slow
def test_two_nodes_equal_one_node(cluster: Cluster, two_ranks: Finished, tmp_path: Path) -> None:
    done = cluster.distill(tmp_path, *SHORT, *NO_EVAL, "cluster=slurm", "cluster.nodes=2", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    for message in (
        "job ",
        "follow   distill watch",
        "output   tail -F",
        "cancel   scancel",
        "resume   distill resume",
        "step 3/3 loss=",
    ):
        assert message in done.stdout
    for ours, theirs in zip(done.metrics, two_ranks.metrics, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/response_tokens"):
            assert ours.get(name) == theirs.get(name)
    job = re.search(r"^job +(\d+)$", done.stdout, re.M)[1]
    check_account(cluster, job, "State,NNodes,ExitCode", "COMPLETED|2|0:0")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_role_may_have_its_node(cluster: Cluster, one_rank: Finished, tmp_path: Path) -> None:
    """One node trains, one samples and one scores: the numbers are those of one rank that does all."""
    roles = ("cluster.roles=split", "engine.teacher.ranks=1", "cluster.nodes=3")
    done = cluster.distill(tmp_path, *SHORT, *NO_EVAL, *roles, "cluster=slurm", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    for ours, theirs in zip(done.metrics[1:], one_rank.metrics[1:], strict=True):
        assert ours["train/response_tokens"] == theirs["train/response_tokens"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert ours["roles/sample_s"] > 0


SLOW_VERIFIER = """
import time
from pathlib import Path
from distill_cli.data.verifiers.exact import verify as exact

def verify(response, answer):
    time.sleep(0.4)  # of eight answers a step: there is time to interrupt it
    while Path("hold").exists():
        time.sleep(0.1)
    return exact(response, answer)
"""


def wait_for(condition: Callable[[], bool], *, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check_account(cluster: Cluster, job: str, fields: str, wanted: str) -> None:
    """Check what Slurm's accounting has of a job, once it has caught up with the queue."""
    shown = lambda: cluster.ask("sacct", "-X", "-n", "-P", "-j", job, "-o", fields)  # noqa: E731
    with suppress(AssertionError):
        wait_for(lambda: shown() == wanted, seconds=30)
    assert shown() == wanted


@pytest.mark.slow
@pytest.mark.exhaustive
def test_parameters_survive_every_end_of_jobs(cluster: Cluster, one_rank: Finished, tmp_path: Path) -> None:
    """Its time limit reached, preempted, its node lost, cancelled: each in a step of the same run."""
    (tmp_path / "slow.py").write_text(SLOW_VERIFIER)
    hold = tmp_path / "hold"  # while it exists no step ends: what interrupts one may take its time
    done = cluster.distill(
        tmp_path, *SHORT, *NO_EVAL[:3], "data.verifier=slow:verify", "checkpoint.period=1", "run.name=r",
        "cluster=slurm", "cluster.slurm.time=30", "cluster.grace_s=50", "cluster.slurm.signal_s=50",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    run = RunDir(tmp_path / "runs/r")
    job = re.search(r"^job +(\d+)$", done.stdout, re.M)[1]
    trains = lambda attempt: RunDir(run.path, attempt=attempt).heartbeat.exists()  # noqa: E731

    wait_for(lambda: run.metrics.exists() and '{"step": 1' in run.metrics.read_text())
    hold.touch()
    run_id = lambda: json.loads((run.path / "mlflow.json").read_text())["run_id"]  # noqa: E731
    wait_for(lambda: run_id() is not None)
    first_id = run_id()
    # Limits are whole minutes. Slurm looks every half minute, and warns between 50 and 80 seconds before the end; the
    # ranks then have 50 seconds, of which at least 18 are left at this moment, also on a machine that is slow to look.
    limit = (elapsed_s(cluster, job) + 57) // 60 + 1
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    # Five seconds an answer hold the step for 40 seconds at most: it may end, and the run stop, before that moment.
    wait_for(lambda: trains(2) or elapsed_s(cluster, job) >= 60 * limit - 48)
    hold.unlink()
    wait_for(lambda: trains(2))
    hold.touch()
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    urgent = cluster.ask("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap=true")
    wait_for(lambda: re.search(r"PreemptTime=\d", cluster.ask("scontrol", "show", "job", job)))
    hold.unlink()
    wait_for(lambda: trains(3))
    hold.touch()
    check_account(cluster, urgent, "State", "COMPLETED")
    node = cluster.ask("squeue", "-h", "-j", job, "-o", "%N")
    cluster.do("fail", node)
    wait_for(lambda: trains(4))
    cluster.do("heal", node)
    cluster.ask("scancel", job)
    hold.unlink()
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", job))
    assert json.loads(run.outcome.read_text())["state"] == "stopped"

    done = cluster.distill(tmp_path, "resume", "runs/r", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    log = next(run.path.glob(f"slurm/{job}_0_log.out")).read_text()
    # It may have judged its second step's answers before it was held.
    assert re.search(r"attempt 1, after step [12]: stopped by SIGUSR2", done.stdout), done.stdout
    assert log.count(f"job {job} is queued again") == 2
    assert log.count("goes on from the checkpoint of step") == 3
    ours, theirs = load_file(run.student / "model.safetensors"), load_file(one_rank.run.student / "model.safetensors")
    assert all(torch.equal(ours[name], param) for name, param in theirs.items())
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["train/loss"] for row in rows[1:]] == [row["train/loss"] for row in one_rank.metrics[1:]]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert [run.info.run_id for run in client.search_runs(experiments(client))] == [first_id] == [run_id()]
    assert client.get_run(first_id).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(first_id, "train/loss")] == [1, 2, 3]


def elapsed_s(cluster: Cluster, job: str) -> int:
    """How long a job has run since its newest start."""
    minutes, seconds = cluster.ask("squeue", "-h", "-j", job, "-o", "%M").split(":")
    return 60 * int(minutes) + int(seconds)


OF_ITS_OWN = ("cluster=slurm", "model.teacher.nodes=1")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_teacher_on_its_own_nodes(cluster: Cluster, one_rank: Finished, tmp_path: Path) -> None:
    secrets = {**SECRETS, TOKEN: "planted-token-4"}
    own = ("cluster=slurm", "model.teacher.nodes=2", "cluster.slurm.teacher.partition=urgent")
    done = cluster.distill(tmp_path, *SHORT, *NO_EVAL, *own, "--wait", **secrets)
    assert done.status == 0, done.stdout + done.stderr
    assert "on 2 nodes of its own" in done.stdout
    check_losses(done.run, one_rank)
    run, teacher = (re.search(pattern, done.stdout, re.M)[1] for pattern in (r"^job +(\d+)$", r"^teacher +job (\d+)$"))
    # Slurm may still be cleaning up after the teacher's job.
    wait_for(lambda: cluster.ask("squeue", "-h", "-j", f"{run},{teacher}") == "")
    check_account(cluster, teacher, "NNodes,Partition", "2|urgent")
    logs = [done.run.path / f"slurm/{teacher}_{node}_log.out" for node in range(2)]
    assert all("engines   1 on the CPU" in log.read_text() for log in logs)
    served = re.findall(r"(https://\S+) serves the teacher", done.run.rank_log(0).read_text())
    assert len({*served}) == 2
    assert [file.name for file in done.run.teachers.rglob("*") if file.is_file()] == ["teacher.safetensors"]
    assert files_with(secrets.values(), tmp_path) == []
    assert not any(secret in done.stdout + done.stderr for secret in secrets.values())


def check_losses(run: RunDir, other: Finished) -> None:
    rows = {row["step"]: row["train/loss"] for row in read_metrics(run.metrics) if row["step"] > 0}
    theirs = {row["step"]: row["train/loss"] for row in other.metrics if row["step"] > 0}
    assert rows == pytest.approx(theirs, abs=1e-6)
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_outlives_its_teachers_job(cluster: Cluster, one_rank: Finished, tmp_path: Path) -> None:
    """The teacher's job is queued again, then killed; the run is cancelled and resumed."""
    (tmp_path / "slow.py").write_text(SLOW_VERIFIER)
    slow = ("data.verifier=slow:verify", "checkpoint.period=1", "run.name=r")
    done = cluster.distill(tmp_path, *SHORT, *NO_EVAL, *slow, *OF_ITS_OWN)
    assert done.status == 0, done.stderr
    run, hold = RunDir(tmp_path / "runs/r"), tmp_path / "hold"
    job, first = json.loads(run.job.read_text())["job_id"], teacher_job(run)
    has = lambda step: run.metrics.exists() and f'{{"step": {step}' in run.metrics.read_text()  # noqa: E731
    queued = lambda one: cluster.ask("squeue", "-h", "-j", one, "-o", "%i") != ""  # noqa: E731

    wait_for(lambda: has(1))
    cluster.ask("scontrol", "requeue", first)
    wait_for(lambda: has(2))
    hold.touch()
    cluster.ask("scancel", "--signal=KILL", first)
    wait_for(lambda: run.teacher_job("teacher").exists() and teacher_job(run) != first)
    cluster.ask("scancel", job)
    hold.unlink()
    wait_for(lambda: not queued(job))
    wait_for(lambda: not any(map(queued, teacher_jobs(cluster))))
    log = next(run.path.glob(f"slurm/{job}_0_log.out")).read_text()
    assert f"job {first} of teacher has ended" in log
    assert "another one is submitted" in log

    done = cluster.distill(tmp_path, "resume", "runs/r", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    check_losses(run, one_rank)
    assert len(list(run.path.glob("logs/attempt_*"))) == 2  # one of each job of the run
    wait_for(lambda: not any(map(queued, teacher_jobs(cluster))))


def teacher_job(run: RunDir) -> str:
    return run.teacher_jobs()["teacher"].job_id


def teacher_jobs(cluster: Cluster) -> list[str]:
    """The jobs of teachers, of any run."""
    lines = cluster.ask("sacct", "-X", "-n", "-P", "-S", "now-1day", "-o", "JobID,JobName%80").splitlines()
    return [line.split("|")[0] for line in lines if line.endswith("_teacher")]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_servers_end_without_their_run(cluster: Cluster, tmp_path: Path) -> None:
    """The run's job is cancelled before it begins: nobody ends the teacher's job but itself."""
    later = ("+cluster.slurm.extra.begin=now+1hour", "+cluster.slurm.teacher.extra.begin=now", "run.name=r")
    done = cluster.distill(tmp_path, *SHORT, *NO_EVAL, *OF_ITS_OWN, *later)
    assert done.status == 0, done.stderr
    run = RunDir(tmp_path / "runs/r")
    job, teacher = json.loads(run.job.read_text())["job_id"], teacher_job(run)
    wait_for(lambda: read_servers(run.servers("teacher")) != [])
    cluster.ask("scancel", job)
    wait_for(lambda: cluster.ask("squeue", "-h", "-j", teacher, "-o", "%i") == "")
    check_account(cluster, teacher, "State", "COMPLETED")
    assert read_servers(run.servers("teacher")) == []


def experiments(client: MlflowClient) -> list[str]:
    return [client.get_experiment_by_name("distill").experiment_id]


BROKEN_LOSS = "def kl(logp, logq):\n    raise ValueError('a loss of my own')\n"
WHOLE_LOSS = "def kl(logp, logq):\n    return logp.exp() * (logp - logq)\n"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_array_resumes_failed_runs(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN_LOSS)
    done = cluster.distill(
        tmp_path, "-m", "loss.kl_type=forward,mine:kl", *SHORT, *NO_EVAL, "train.max_steps=1", "run.name=s",
        "cluster=slurm", "cluster.parallel_jobs=2", "--wait",
    )  # fmt: skip
    assert done.status == 1, done.stdout + done.stderr
    array = re.search(r"^job +(\d+), an array of 2$", done.stdout, re.M)[1]
    check_account(cluster, array, "JobID,State", f"{array}_0|COMPLETED\n{array}_1|FAILED")
    outcomes = [(tmp_path / "runs/s" / folder / "outcome.json").exists() for folder in elements(tmp_path)]
    assert outcomes == [True, False]
    assert "a loss of my own" in done.stdout
    metrics = tmp_path / "runs/s" / elements(tmp_path)[0] / "metrics.jsonl"
    before = metrics.read_bytes()

    (tmp_path / "mine.py").write_text(WHOLE_LOSS)
    done = cluster.distill(tmp_path, "resume", "runs/s", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    assert "1 of 2 runs go on" in done.stdout
    assert all((tmp_path / "runs/s" / folder / "outcome.json").exists() for folder in elements(tmp_path))
    assert before == metrics.read_bytes()
    done = cluster.distill(tmp_path, "resume", "runs/s")
    assert (done.status, "every run has finished" in done.stderr) == (2, True)


GRID = ("loss.topk=4,8", "loss.kl_weight=0.3,0.5")
ONE_STEP = (
    "train.max_steps=1", "rollout.prompts_per_step=8", "train.global_batch_size=8", "eval.at_start=false",
    "eval.teacher=false", "eval.period=0", "eval.max_samples=8", "eval.max_new_tokens=16",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_grid_is_one_array(cluster: Cluster, tmp_path: Path) -> None:
    """With a real MLflow server that has a password."""
    address = f"127.0.0.1:{free_port()}"
    server = start_server(tmp_path, f"http://{address}")
    uri = f"tracker.mlflow.uri=http://me:planted-uri-3@{address}"
    try:
        done = cluster.distill(
            tmp_path, "-m", *GRID, *ONE_STEP, uri, "run.name=s", "cluster=slurm", "cluster.parallel_jobs=2",
            "--wait", timeout_s=580, **SECRETS,
        )  # fmt: skip
        assert done.status == 0, done.stdout + done.stderr
        client = MlflowClient(tracking_uri=f"http://{address}")
        stored = client.search_runs(experiments(client))
    finally:
        stop(server)
    (parent,) = [run for run in stored if run.info.run_name == "s"]
    assert parent.data.params == {"loss.topk": "4, 8", "loss.kl_weight": "0.3, 0.5"}
    children = [run for run in stored if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name for run in children) == elements(tmp_path)
    assert len(elements(tmp_path)) == 4
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert len({run.data.tags["slurm.array_job_id"] for run in children}) == 1
    for title in (r"^KL forward \(", r"^accuracy \("):
        table = re.search(title + r".*\n.*0\.3 +0\.5 *\n4 .*\n8 .*\n", done.stdout, re.M)
        assert table, done.stdout
        assert len(re.findall(r"\d\.\d+", table[0])) == 2 + 4

    kept = {*SECRETS.values(), "planted-uri-3"}
    assert files_with(kept, tmp_path) == []
    assert not any(secret in done.stdout + done.stderr for secret in kept)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_search_batch_is_an_array(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.distill(
        tmp_path, "-m", "loss.kl_weight=interval(0.1,0.9)", "loss.topk=4,8", *ONE_STEP, "tracker=none", "run.name=s",
        "search.trials=3", "cluster=slurm", "cluster.parallel_jobs=2", timeout_s=580,
    )  # fmt: skip
    assert done.status == 0, done.stdout + done.stderr
    assert re.findall(r"^job +\d+(.*)$", done.stdout, re.M) == [", an array of 2", ""]
    results = json.loads((tmp_path / "runs/s/search.json").read_text())
    assert [trial["run"] for trial in results["trials"]] == elements(tmp_path)
    assert len({trial["overrides"][0] for trial in results["trials"]}) == 3
    best = max(results["trials"], key=lambda trial: trial["value"])
    assert (results["best"], results["metric"]) == (best, "val/accuracy")
    assert f"best     {best['value']:.4g} with {' '.join(best['overrides'])}" in done.stdout
    done = cluster.distill(tmp_path, "resume", "runs/s")
    assert (done.status, "search.trials=N" in done.stderr) == (2, True)


def elements(folder: Path, sweep: str = "s") -> list[str]:
    return [element.folder for element in SweepDir(folder / "runs" / sweep).elements()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cluster.slurm.partition=mian"], "cluster.slurm.partition=mian: no such partition; did you mean main?"),
        (["cluster.nodes=9"], "cluster.nodes=9: partition main gives a job at most 4"),
        (
            ["cluster.slurm.partition=short", "cluster.slurm.time=01:00:00"],
            "cluster.slurm.time=01:00:00: partition short allows 5 minutes",
        ),
        (["cluster.gpus_per_node=3"], "cluster.gpus_per_node=3: a node of partition main has 2"),
        (["cluster.slurm.shared_folders=[/home]"], "run.root=runs: not in a folder that all nodes see"),
        (["cluster.slurm.time=1x"], "cluster.slurm.time=1x: must be minutes, HH:MM:SS or D-HH:MM:SS"),
        (["+cluster.slurm.extra.output=x"], "cluster.slurm.extra.output: is set by distill"),
        (
            ["-m", "loss.topk=4,8", "search.trials=2", "cluster.slurm.partition=mian"],
            "cluster.slurm.partition=mian: no such",
        ),
    ],
)
def test_impossible_jobs_are_refused(
    cluster: Cluster,
    tmp_path: Path,
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.conf)
    jobs_before = all_jobs(cluster)
    assert message in "\n".join(refused(tmp_path, monkeypatch, capsys, *argv, "cluster=slurm"))
    assert not list(tmp_path.glob("runs/*"))
    assert all_jobs(cluster) == jobs_before


@pytest.mark.parametrize("argv", [(), ("-m", "loss.topk=4,8", "search.trials=2")], ids=["run", "search"])
def test_a_refused_submission_leaves_nothing(cluster: Cluster, tmp_path: Path, argv: tuple[str, ...]) -> None:
    jobs_before = all_jobs(cluster)
    done = cluster.distill(tmp_path, *argv, "cluster=slurm", "cluster.slurm.constraint=no_such")
    assert done.status == 2, done.stdout
    assert "Slurm refuses the job: Invalid feature specification" in done.stderr
    assert not list(tmp_path.glob("runs/*"))
    assert all_jobs(cluster) == jobs_before


def all_jobs(cluster: Cluster) -> str:
    return cluster.ask("sacct", "-X", "-n", "-P", "-S", "now-1day", "-o", "JobID")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_watch_ends_with_a_cancelled_job(cluster: Cluster, tmp_path: Path) -> None:
    later = ("cluster=slurm", "+cluster.slurm.extra.begin=now+1hour", "run.name=r", "train.max_steps=1")
    done = cluster.distill(tmp_path, *SHORT[1:], *NO_EVAL, *later)
    assert done.status == 0, done.stderr
    job = re.search(r"^job +(\d+)$", done.stdout, re.M)[1]
    cluster.ask("scancel", job)
    watched = cluster.distill(tmp_path, "watch", "runs/r")
    assert watched.status == 1
    assert f"job {job}: CANCELLED" in watched.stdout
    assert "failed after step 0; distill resume" in watched.stdout
    here = cluster.distill(tmp_path, "resume", "runs/r", "cluster.launcher=local")
    assert here.status == 0, here.stderr
    assert not RunDir(tmp_path / "runs/r").job.exists()
    watched = cluster.distill(tmp_path, "watch", "runs/r")
    assert (watched.status, watched.stdout.count("CANCELLED")) == (0, 0)


def test_plan_prints_the_job_script(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.distill(
        tmp_path, "plan", "cluster=slurm", "cluster.slurm.partition=short", "cluster.slurm.time=4", "cluster.nodes=2",
        'cluster.slurm.setup=["module load x"]', "+cluster.slurm.container.image=a.sqsh", "cluster.slurm.mem=2G",
        "+cluster.slurm.extra.reservation=mine",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    for line in (
        "#SBATCH --partition=short", "#SBATCH --time=4", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1",
        "#SBATCH --reservation=mine", "#SBATCH --mem=2G", "#SBATCH --signal=USR2@120", "#SBATCH --requeue",
        "module load x", "--container-image=a.sqsh", "-m submitit.core._submit",
    ):  # fmt: skip
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == []
