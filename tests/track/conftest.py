"""A run's folder and an MLflow database of its own."""

import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import TensorboardConfig, WandbConfig, WandbMode
from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config, save_config
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.run_dir import RunDir, create, read_json
from distill_cli.track.base import Tracker
from distill_cli.track.mlflow import MlflowTracker
from distill_cli.track.tensorboard import TensorboardTracker
from distill_cli.track.wandb import WandbTracker


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


def wandb_tracker(run: RunDir, uri: str | None = None, **settings) -> WandbTracker:
    """Build the tracker as a new process does: offline without an address."""
    mode = WandbMode.online if uri else WandbMode.offline
    mine = WandbConfig(enabled=True, uri=uri, mode=mode, project="test", **settings)
    return WandbTracker(mine, load_config(run.config), run)


def tensorboard_tracker(run: RunDir) -> TensorboardTracker:
    return TensorboardTracker(TensorboardConfig(enabled=True), load_config(run.config), run)


@pytest.fixture
def trackers(run: RunDir, uri: str) -> dict[str, Callable[[], Tracker]]:
    """For each tracker, what builds it as a new process does."""
    return {
        "mlflow": lambda: tracker(run, uri),
        "wandb": lambda: wandb_tracker(run),
        "tensorboard": lambda: tensorboard_tracker(run),
    }


def write_rows(run: RunDir, steps: Iterable[int]) -> None:
    """Append rows with two metrics, one of them not finite."""
    with closing(MetricsFile(run.metrics)) as metrics:
        for step in steps:
            metrics.write(step, {"train/loss": 1 / (step + 3), "val/accuracy": step / 8, "none": float("nan")})


def state_of(run: RunDir) -> dict:
    return read_json(run.path / "mlflow.json")


def history(uri: str, run: RunDir, key: str) -> list[tuple[int, float]]:
    run_id = state_of(run)["run_id"]
    if run_id is None:  # about to be made
        return []
    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key))
