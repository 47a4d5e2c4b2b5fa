"""A run's folder and an MLflow database of its own."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config, save_config
from distill_cli.folders.run_dir import RunDir, create, read_json
from distill_cli.track.mlflow import MlflowTracker


@pytest.fixture(scope="session")
def config() -> Config:
    (job,) = compose(["data.validation=null"])
    return job.config


@pytest.fixture
def run(tmp_path: Path, config: Config) -> RunDir:
    run = create(tmp_path / "runs" / "a", command=["distill"])
    save_config(config, run.config)
    run.metrics.touch()
    return run


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    """A database of the test's own, without runs."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def tracker(run: RunDir, uri: str, **settings) -> MlflowTracker:
    """Build the tracker as a new process does."""
    config = load_config(run.config)
    mine = replace(config.tracker.mlflow, uri=uri, experiment="test", run_name="a", **settings)
    return MlflowTracker(mine, replace(config, run=replace(config.run, root=str(run.path.parent))), run)


def state_of(run: RunDir) -> dict:
    return read_json(run.path / "mlflow.json")


def history(uri: str, run: RunDir, key: str) -> list[tuple[int, float]]:
    run_id = state_of(run)["run_id"]
    if run_id is None:  # about to be made
        return []
    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key))
