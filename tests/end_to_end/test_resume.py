"""Runs that are killed, stopped and taken up again, against the run that was left alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from distill_cli.checkpoint import store
from distill_cli.folders.metrics_file import read_metrics
from tests.end_to_end.conftest import SHORT, Finished, distill, refused

pytestmark = pytest.mark.slow

EVAL = ("eval.period=2", "eval.max_samples=40")
"""As in the fixture `one_rank`."""
NO_EVAL = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")


def start(folder: Path, *argv: str) -> subprocess.Popen:
    with (folder / "output.txt").open("wb") as output:
        command = [sys.executable, "-m", "distill_cli", *argv]
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def learned(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time", "perf"))} for row in rows]


def test_a_killed_rank_changes_nothing(one_rank: Finished, tmp_path: Path) -> None:
    process = start(tmp_path, *SHORT, *EVAL, "run.name=r", "checkpoint.period=1")
    run = tmp_path / "runs/r"
    wait_until((run / "checkpoints/step_1").exists, process)
    (rank,) = psutil.Process(process.pid).children()[0].children()
    rank.kill()
    assert process.wait(200) == 0, (tmp_path / "output.txt").read_text()
    printed = (tmp_path / "output.txt").read_text()
    assert "warning: attempt 1 failed: rank 0 was killed by SIGKILL" in printed
    assert "attempt 2 goes on from the checkpoint of step" in printed
    assert re.search(r"earlier +attempt 1, after step \d: rank 0 was killed by SIGKILL", printed)
    assert (run / "logs/attempt_2/rank_0.log").is_file()
    same_end(one_rank, run)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    assert Counter(m.step for m in client.get_metric_history(run_id, "train/loss")) == Counter((1, 2, 3))
    assert client.get_run(run_id).info.status == "FINISHED"

    # Back to an earlier step: what came after it is kept aside, and comes out the same again. The checkpoint knows
    # which of MLflow's runs this is.
    (run / "mlflow.json").unlink()
    (run / "trackers.json").unlink()
    done = distill(tmp_path, "resume", "runs/r", "--step", "1")
    assert done.status == 0, done.stderr
    assert "goes on from the checkpoint of step 1" in done.stdout
    assert (run / "checkpoints_aside/step_3").is_dir()
    same_end(one_rank, run)
    assert json.loads((run / "mlflow.json").read_text())["run_id"] == run_id
    assert Counter(m.step for m in client.get_metric_history(run_id, "train/loss")) == Counter((1, 2, 3))


def same_end(one_rank: Finished, run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert learned(rows) == learned(one_rank.metrics)
    ours, theirs = load_file(run / "student/model.safetensors"), load_file(one_rank.run.student / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, param in theirs.items():
        assert torch.equal(ours[name], param), name


@pytest.mark.exhaustive
def test_stopped_run_resumes_on_other_ranks(one_rank: Finished, tmp_path: Path) -> None:
    """In the middle of a validation: what the step learned is saved, and validated and recorded when it goes on."""
    run, metrics = tmp_path / "runs/r", tmp_path / "runs/r/metrics.jsonl"
    often = ("eval.period=1", "eval.at_start=false", "eval.teacher=false", "eval.max_samples=512", "tracker=none")
    process = start(tmp_path, *SHORT, *often, "run.name=r")
    heartbeat = run / "logs/attempt_1/heartbeat"  # the stage, and the number of steps
    wait_until(lambda: heartbeat.exists() and heartbeat.read_text().startswith("eval "), process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(100) == 128 + signal.SIGUSR1
    printed = (tmp_path / "output.txt").read_text()
    assert "stopped: saved after step 1; distill resume runs/r goes on" in printed
    assert [row["step"] for row in read_metrics(metrics)] == [0]
    (checkpoint,) = store.find(run / "checkpoints")
    assert (checkpoint.step, checkpoint.recorded_step) == (1, 0)
    for ranks in (("mesh.tensor=2", "train.max_steps=2"), ("mesh.tensor=1", "train.max_steps=3")):
        done = distill(tmp_path, "resume", "runs/r", "cluster.ranks_per_node=2", *ranks)
        assert done.status == 0, done.stderr
        assert "attempt 1, after step 0: stopped by SIGUSR1" in done.stdout
    rows = read_metrics(metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for ours, theirs in zip(rows[1:], one_rank.metrics[1:], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert "val/accuracy" in ours


def test_impossible_resumes_are_refused(
    one_rank: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = "runs/latest"
    for argv, message in (
        (["runs/none"], "no such folder"),
        (["runs"], "no run is there"),
        ([], "required: RUN|SWEEP"),
        ([run], "finished after 3 steps; give train.max_steps=N"),
        ([run, "train.max_steps=9", "train.lr=3", "loss=reverse"], "train.lr=3.0: the run was made with 0.001"),
        ([run, "train.max_steps=9", "loss=reverse"], "loss.kl_type=reverse: the run was made with mixed"),
        ([run, "train.max_step=9"], "did you mean train.max_steps?"),
        ([run, "--step", "2"], "no checkpoint 2 (there are steps: 3)"),
        ([run, "--step", "x"], "must be the number of a step"),
        ([run, "train.max_steps=9", "mesh.tensor=3"], "must divide the 1 ranks"),
    ):
        assert message in "\n".join(refused(one_rank.folder, monkeypatch, capsys, "resume", *argv)), argv
    with one_rank.run.lock():
        done = distill(one_rank.folder, "resume", run, "train.max_steps=9")
    assert (done.status, f"in use by process {os.getpid()}" in done.stderr) == (2, True)


def test_a_hand_edited_config_is_refused(
    one_rank: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(one_rank.run.path, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("topk: 16", "topk: 32"))
    (line,) = refused(tmp_path, monkeypatch, capsys, "resume", "run", "train.max_steps=5")
    assert "loss.topk=32: the run was made with 16" in line


@pytest.mark.exhaustive
def test_an_export_is_the_trained_student(
    one_rank: Finished,
    two_ranks: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for finished in (one_rank, two_ranks):
        folder = tmp_path / finished.folder.name
        done = distill(finished.folder, "export", "runs/latest", str(folder))
        assert done.status == 0, done.stderr
        assert {file.name for file in finished.run.student.iterdir()} - {"README.md"} <= {
            file.name for file in folder.iterdir()
        }
        ours, theirs = (load_file(path / "model.safetensors") for path in (folder, finished.run.student))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = (tmp_path / one_rank.folder.name / "README.md").read_text()
    assert "| loss | mixed, kl_weight 0.3, the teacher's top-16, tail bucket |" in card
    assert "student at this step" in card
    for argv, message in (
        (["runs/latest", str(tmp_path)], "exists already"),
        (["runs/latest", "--step", "7"], "no checkpoint 7"),
        (["runs/latest", "--stepp", "7"], "did you mean --step?"),
    ):
        assert message in "\n".join(refused(one_rank.folder, monkeypatch, capsys, "export", *argv)), argv
    offline = distill(
        one_rank.folder, "export", "runs/latest", str(tmp_path / "p"), "--push", "a/b", HF_HUB_OFFLINE="1"
    )
    assert offline.status == 1
    assert "--push a/b: " in offline.stderr
    assert len(offline.stderr.splitlines()) == 1


@pytest.mark.exhaustive
def test_infinite_loss_ends_with_rollouts(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def kl(logp, logq):\n    return (logp - logq) * float('nan')\n")
    done = distill(tmp_path, *SHORT, *NO_EVAL, "loss.kl_type=broken:kl", "run.name=r", "train.max_bad_updates=2")
    assert done.status == 1
    assert "the update is skipped" in done.stdout
    assert "not finite, 2 updates in a row" in done.stderr
    assert "attempt 2" not in done.stdout  # it would come again
    table = pyarrow.parquet.read_table(tmp_path / "runs/r/rollouts/bad_step_1.parquet")
    assert table.num_rows == 4
    assert all(len(ids) == len(logp) for ids, logp in zip(table["response_ids"], table["sampled_logp"], strict=True))


@pytest.mark.exhaustive
def test_truncated_answers_stop_the_run(tmp_path: Path) -> None:
    cut = ("rollout.max_new_tokens=2", "rollout.on_truncation=stop", "run.name=r", "train.max_steps=9")
    done = distill(tmp_path, *SHORT, *NO_EVAL, *cut)
    assert done.status == 0, done.stderr
    assert "stopped by rollout/truncated_rate is above rollout.max_truncated_rate=0.9 for 3 steps" in done.stdout
    assert (tmp_path / "runs/r/checkpoints/step_3").is_dir()
