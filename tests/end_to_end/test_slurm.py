"""Runs on a real Slurm of four nodes, against the same runs without it."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_cli.rundir import RunDir
from tests.end_to_end.conftest import SHORT, Cluster, Finished

pytestmark = pytest.mark.slurm
NO_EVAL = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")


@pytest.mark.slow
def test_two_nodes_learn_what_two_ranks_of_one_node_learn(
    cluster: Cluster, two_ranks: Finished, tmp_path: Path
) -> None:
    done = cluster.distill(tmp_path, *SHORT, *NO_EVAL, "cluster=slurm", "cluster.nodes=2", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    for said in ("job ", "follow   tail -F", "cancel   scancel", "resume   distill resume", "step 3/3 loss="):
        assert said in done.stdout
    for ours, theirs in zip(done.metrics, two_ranks.metrics, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/response_tokens"):
            assert ours.get(name) == theirs.get(name)
    job = re.search(r"^job +(\d+)$", done.stdout, re.M)[1]
    assert cluster.ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NNodes,ExitCode") == "COMPLETED|2|0:0"


SLOW_VERIFIER = """
import time
from distill_cli.data.verifiers.exact import verify as exact

def verify(response, answer):
    time.sleep(0.4)  # of eight answers a step: there is time to interrupt it
    return exact(response, answer)
"""


def wait_for(condition: Callable[[], bool], *, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_whatever_ends_a_job_the_run_ends_with_the_same_parameters(
    cluster: Cluster, one_rank: Finished, tmp_path: Path
) -> None:
    """Warned of its time limit, preempted, its node lost, cancelled: each in a step of the same run."""
    (tmp_path / "slow.py").write_text(SLOW_VERIFIER)
    done = cluster.distill(
        tmp_path, *SHORT, *NO_EVAL, "data.verifier=slow:verify", "checkpoint.period=1", "run.name=r", "cluster=slurm",
        "cluster.grace_s=20", "cluster.signal_s=20",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    run = RunDir(tmp_path / "runs/r")
    job = re.search(r"^job +(\d+)$", done.stdout, re.M)[1]
    trains = lambda attempt: RunDir(run.path, attempt=attempt).heartbeat.exists()  # noqa: E731

    wait_for(lambda: run.metrics.exists() and '{"step": 1' in run.metrics.read_text())
    cluster.ask("scancel", "--signal=USR2", job)  # what Slurm sends before the time limit
    wait_for(lambda: trains(2))
    urgent = cluster.ask("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap=true")
    wait_for(lambda: trains(3))
    assert "COMPLETED" in cluster.ask("sacct", "-X", "-n", "-P", "-j", urgent, "-o", "State")
    node = cluster.ask("squeue", "-h", "-j", job, "-o", "%N")
    cluster.do("fail", node)
    wait_for(lambda: trains(4))
    cluster.do("heal", node)
    cluster.ask("scancel", job)
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", job))
    assert json.loads(run.outcome.read_text())["state"] == "stopped"

    done = cluster.distill(tmp_path, "resume", "runs/r", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    log = next(run.path.glob(f"slurm/{job}_0_log.out")).read_text()
    assert log.count(f"job {job} is queued again") == 2
    assert log.count("goes on from the checkpoint of step") == 3
    ours, theirs = load_file(run.student / "model.safetensors"), load_file(one_rank.run.student / "model.safetensors")
    assert all(torch.equal(ours[name], param) for name, param in theirs.items())
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["train/loss"] for row in rows[1:]] == [row["train/loss"] for row in one_rank.metrics[1:]]


BROKEN_LOSS = "def kl(logp, logq):\n    raise ValueError('a loss of my own')\n"
WHOLE_LOSS = "def kl(logp, logq):\n    return logp.exp() * (logp - logq)\n"


@pytest.mark.slow
def test_a_sweep_is_one_array_and_goes_on_with_what_failed(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN_LOSS)
    grid = ("loss.topk=4,8", "loss.kl_type=forward,mine:kl")
    done = cluster.distill(
        tmp_path, "-m", *grid, *SHORT, *NO_EVAL, "train.max_steps=1", "run.name=s", "cluster=slurm",
        "cluster.array_parallelism=2", "--wait",
    )  # fmt: skip
    assert done.status == 1, done.stdout + done.stderr
    array = re.search(r"^job +(\d+), an array of 4$", done.stdout, re.M)[1]
    states = cluster.ask("sacct", "-X", "-n", "-P", "-j", array, "-o", "JobID,State").splitlines()
    assert states == [f"{array}_{i}|{state}" for i, state in enumerate(["COMPLETED", "FAILED"] * 2)]
    outcomes = [(tmp_path / "runs/s" / folder / "outcome.json").exists() for folder in elements(tmp_path)]
    assert outcomes == [True, False] * 2
    assert "a loss of my own" in done.stdout
    assert re.search(r"^4 +\d", done.stdout, re.M)  # the table: topk down, kl_type across
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/s/[02]_*/metrics.jsonl")}

    (tmp_path / "mine.py").write_text(WHOLE_LOSS)
    done = cluster.distill(tmp_path, "resume", "runs/s", "--wait")
    assert done.status == 0, done.stdout + done.stderr
    assert "2 of 4 runs go on" in done.stdout
    assert all((tmp_path / "runs/s" / folder / "outcome.json").exists() for folder in elements(tmp_path))
    assert before == {path: path.read_bytes() for path in before}
    done = cluster.distill(tmp_path, "resume", "runs/s")
    assert (done.status, "every run has finished" in done.stderr) == (2, True)


def elements(folder: Path) -> list[str]:
    return [element["folder"] for element in json.loads((folder / "runs/s/sweep.json").read_text())["elements"]]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["cluster.partition=mian"], "cluster.partition=mian: no such partition; did you mean main?"),
        (["cluster.nodes=9"], "cluster.nodes=9: partition main gives a job at most 4"),
        (
            ["cluster.partition=short", "cluster.time=01:00:00"],
            "cluster.time=01:00:00: partition short allows 5 minutes at most",
        ),
        (["cluster.gpus_per_node=3"], "cluster.gpus_per_node=3: a node of partition main has 2"),
        (["cluster.shared_folders=[/home]"], "run.root=runs: not in a folder that all nodes see"),
        (["cluster.time=1x"], "cluster.time=1x: must be minutes, HH:MM:SS or D-HH:MM:SS"),
        (["+cluster.extra.output=x"], "cluster.extra.output: is set by distill"),
        (["cluster.constraint=no_such"], "Slurm refuses the job: Invalid feature specification"),
    ],
)
def test_what_the_cluster_cannot_run_is_refused(cluster: Cluster, tmp_path: Path, argv: list[str], said: str) -> None:
    jobs_before = cluster.ask("sacct", "-X", "-n", "-P", "-S", "now-1day", "-o", "JobID")
    done = cluster.distill(tmp_path, "cluster=slurm", *argv)
    assert done.status == 2, done.stdout
    assert said in done.stderr
    assert not list(tmp_path.glob("runs/*"))
    assert cluster.ask("sacct", "-X", "-n", "-P", "-S", "now-1day", "-o", "JobID") == jobs_before


def test_plan_prints_the_script_and_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.distill(
        tmp_path, "plan", "cluster=slurm", "cluster.partition=short", "cluster.time=4", "cluster.nodes=2",
        'cluster.setup=["module load x"]', "+cluster.container.image=a.sqsh", "+cluster.extra.reservation=mine",
        "cluster.mem=2G",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    for line in (
        "#SBATCH --partition=short", "#SBATCH --time=4", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1",
        "#SBATCH --reservation=mine", "#SBATCH --mem=2G", "#SBATCH --signal=USR2@120", "#SBATCH --requeue",
        "module load x", "--container-image=a.sqsh", "-m submitit.core._submit",
    ):  # fmt: skip
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == []
