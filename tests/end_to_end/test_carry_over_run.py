"""Runs that carry answers over steps and train on those of earlier weights: killed, taken up again, replayed."""

import shutil
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from distill_cli.checkpoint import store
from distill_cli.folders.metrics_file import read_metrics
from tests.end_to_end.conftest import SHORT, Finished, distill
from tests.end_to_end.test_replay import no_engines
from tests.end_to_end.test_resume import NO_EVAL, learned, start, wait_until

pytestmark = pytest.mark.slow

CARRIED = (
    *SHORT,
    *NO_EVAL,
    *("rollout.carry_over=true", "rollout.tokens_per_step=90", "rollout.staleness=1", "rollout.max_age=3"),
    *("rollout.max_new_tokens={0:16,3:30}", "train.max_steps=6", "checkpoint.period=1", "rollout.save_scores=true"),
    *("cluster.ranks_per_node=2", "checkpoint.keep_top_k=10"),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = distill(tmp_path_factory.mktemp("alone"), *CARRIED)
    assert done.status == 0, done.stdout + done.stderr
    return done


def same_student(ours: Path, theirs: Path) -> bool:
    ours, theirs = (load_file(run / "student/model.safetensors") for run in (ours, theirs))
    assert ours.keys() == theirs.keys()
    return all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.exhaustive
def test_steps_have_their_budget(alone: Finished) -> None:
    rows = alone.metrics[1:]
    assert [row["train/response_tokens"] for row in rows] == [90] * 6
    assert all(row["rollout/carried"] > 0 and row["rollout/oldest"] <= 3 for row in rows)
    assert all("rollout/drift" in row and "rollout/engine_mismatch" not in row for row in rows)
    lengths = [row["rollout/mean_length"] for row in rows if "rollout/mean_length" in row]
    assert max(lengths[:2]) <= 16 < max(lengths)  # step 3 was sampled after two steps, 4 and 5 after three
    assert "Steps in which answers were written that go on" in (alone.run.path / "report.html").read_text()


SPLIT = ("cluster.roles=split", "engine.teacher.ranks=1", "cluster.ranks_per_node=4")
"""Two ranks train, as in the shared run, one samples and one scores."""


@pytest.mark.exhaustive
def test_split_and_killed_runs_are_exact(alone: Finished, tmp_path: Path) -> None:
    """The rank that scores is killed; what was sampled ahead with earlier weights is not lost."""
    process = start(tmp_path, *CARRIED, *SPLIT, "run.name=r")
    run = tmp_path / "runs/r"
    wait_until((run / "checkpoints/step_2").exists, process)
    psutil.Process(process.pid).children()[0].children()[3].kill()
    assert process.wait(200) == 0, (tmp_path / "output.txt").read_text()
    printed = (tmp_path / "output.txt").read_text()
    assert "attempt 1 failed: rank 3 was killed by SIGKILL" in printed
    assert "attempt 2 goes on from the checkpoint of step" in printed
    rows, others = learned(read_metrics(run / "metrics.jsonl")), learned(alone.metrics)
    for row, other in zip(rows[1:], others[1:], strict=True):
        assert row.pop("roles/sample_s") > 0
        assert row.pop("rollout/drift") == pytest.approx(other.pop("rollout/drift"), abs=1e-6)  # of another batch
        assert row == other
    assert same_student(run, alone.run.path)
    # On one rank the slots are another engine's, and sums are taken in another order.
    for folder in (run / "checkpoints").glob("step_[3-6]"):
        shutil.rmtree(folder)
    (checkpoint, *_) = reversed(store.find(run / "checkpoints"))
    assert (checkpoint.path / store.IN_FLIGHT).is_file()
    done = distill(tmp_path, "resume", "runs/r", "--step", str(checkpoint.step), *SHARED)
    assert done.status == 0, done.stderr
    for row, other in zip(read_metrics(run / "metrics.jsonl")[1:], alone.metrics[1:], strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


SHARED = ("cluster.roles=shared", "cluster.ranks_per_node=1")


@pytest.mark.exhaustive
def test_a_replay_of_parts_is_exact(alone: Finished, tmp_path: Path) -> None:
    done = distill(tmp_path, "replay", str(alone.run.path), "tracker=none", **no_engines(tmp_path))
    assert done.status == 0, done.stdout + done.stderr
    names = [name for name in alone.metrics[1] if name.startswith("train/")]
    for ours, theirs in zip(done.metrics[1:], alone.metrics[1:], strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
        assert ours.get("rollout/mean_length") == theirs.get("rollout/mean_length")
    assert same_student(done.run.path, alone.run.path)
