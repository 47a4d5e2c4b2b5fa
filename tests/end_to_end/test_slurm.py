"""Runs on a real Slurm of four nodes, against the same runs without it."""

import re
from pathlib import Path

import pytest

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
