"""Optuna's sweeper, which chooses runs of the real command."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import SweepDir
from tests.end_to_end.conftest import distill


@pytest.mark.slow
def test_optuna_chooses_runs_by_their_final_accuracy(tmp_path: Path) -> None:
    done = distill(
        tmp_path, "-m", "hydra/sweeper=optuna", "loss.kl_weight=interval(0.1,0.9)", "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1", "run.name=s", "train.max_steps=1",
        "rollout.prompts_per_step=8", "train.global_batch_size=8", "eval.at_start=false", "eval.teacher=false",
        "eval.period=0", "eval.max_samples=16",
    )  # fmt: skip
    assert done.status == 0, done.stdout + done.stderr
    sweep = SweepDir(tmp_path / "runs/s")
    weights = [float(element.overrides[0].removeprefix("loss.kl_weight=")) for element in sweep.elements()]
    assert len(set(weights)) == 2
    assert all(0.1 <= weight <= 0.9 for weight in weights)
    accuracies = []
    for element, weight in zip(sweep.elements(), weights, strict=True):
        folder = sweep.path / element.folder
        assert yaml.safe_load((folder / "config.yaml").read_text())["loss"]["kl_weight"] == weight
        assert json.loads((folder / "outcome.json").read_text())["state"] == "finished"
        accuracies.append(read_metrics(folder / "metrics.jsonl")[-1]["val/accuracy"])
    best = yaml.safe_load((sweep.path / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(accuracies)
    assert f"best     {max(accuracies):.4g} with loss.kl_weight={best['best_params']['loss.kl_weight']}" in done.stdout

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    stored = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    (parent,) = [run for run in stored if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.params == {"loss.kl_weight": "interval(0.1,0.9)"}
    assert [run.data.tags.get("mlflow.parentRunId") for run in stored].count(parent.info.run_id) == 2
    assert {run.info.status for run in stored} == {"FINISHED"}
