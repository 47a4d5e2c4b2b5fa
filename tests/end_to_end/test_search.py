"""A search of the real command, and its resumption."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import SweepDir
from tests.end_to_end.conftest import distill


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_is_judged_by_accuracy(tmp_path: Path) -> None:
    done = distill(
        tmp_path, "-m", "loss.kl_weight=interval(0.1,0.9)", "search.trials=2", "cluster.parallel_jobs=2", "run.name=s",
        "train.max_steps=1", "rollout.prompts_per_step=8", "train.global_batch_size=8", "eval.at_start=false",
        "eval.teacher=false", "eval.period=0", "eval.max_samples=16",
    )  # fmt: skip
    assert done.status == 0, done.stdout + done.stderr
    sweep = SweepDir(tmp_path / "runs/s")
    check_results(sweep, done.stdout, trials=2)
    before = [(sweep.path / element.folder / "metrics.jsonl").read_bytes() for element in sweep.elements()]

    done = distill(tmp_path, "resume", "runs/s")
    assert (done.status, "search.trials=N" in done.stderr) == (2, True), done.stdout + done.stderr
    done = distill(tmp_path, "resume", "runs/s", "search.trials=3", "cluster.parallel_jobs=1")
    assert done.status == 0, done.stdout + done.stderr
    check_results(sweep, done.stdout, trials=3)
    after = [(sweep.path / element.folder / "metrics.jsonl").read_bytes() for element in sweep.elements()]
    assert after[:2] == before

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    stored = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    (parent,) = [run for run in stored if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.params == {"loss.kl_weight": "interval(0.1,0.9)"}
    assert [run.data.tags.get("mlflow.parentRunId") for run in stored].count(parent.info.run_id) == 3
    assert {run.info.status for run in stored} == {"FINISHED"}


def check_results(sweep: SweepDir, printed: str, *, trials: int) -> None:
    """Each trial trained with its own weight, and the best of them is printed and written."""
    weights, accuracies = [], []
    for element in sweep.elements():
        folder = sweep.path / element.folder
        weights.append(yaml.safe_load((folder / "config.yaml").read_text())["loss"]["kl_weight"])
        assert element.overrides == [f"loss.kl_weight={weights[-1]}"]
        assert json.loads((folder / "outcome.json").read_text())["state"] == "finished"
        accuracies.append(read_metrics(folder / "metrics.jsonl")[-1]["val/accuracy"])
    assert len(set(weights)) == trials
    assert all(0.1 <= weight <= 0.9 for weight in weights)
    results = json.loads((sweep.path / "search.json").read_text())
    assert [trial["value"] for trial in results["trials"]] == accuracies
    assert results["best"] == results["trials"][accuracies.index(max(accuracies))]
    assert f"best     {max(accuracies):.4g} with {results['best']['overrides'][0]}" in printed
