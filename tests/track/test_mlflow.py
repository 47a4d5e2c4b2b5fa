"""metrics.jsonl and what MLflow has of it, against a real SQLite store and a real server that goes away."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from distill_cli.rundir import RunDir, create
from distill_cli.track.mlflow import MlflowShipper, MlflowTarget, ship
from distill_cli.track.recorder import MetricsFile, cut_back, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = create(tmp_path / "runs" / "a", command=["distill"])
    run.metrics.touch()
    return run


def target(uri: str) -> MlflowTarget:
    return MlflowTarget(uri=uri, experiment="test", run_name="a", params={"loss.topk": 64, "long": "x" * 10_000})


def history(uri: str, run: RunDir, key: str) -> list[tuple[int, float]]:
    run_id = json.loads((run.path / "mlflow.json").read_text())["run_id"]
    if run_id is None:  # about to be made
        return []
    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key))


def test_a_line_that_is_cut_off_is_not_read(run: RunDir) -> None:
    with MetricsFile(run.metrics) as metrics:
        metrics.write(1, {"a": 0.5, "b": float("nan"), "c": 3})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "a"')
    (row,) = read_metrics(run.metrics)
    assert (row["step"], row["a"], row["b"], row["c"]) == (1, 0.5, None, 3)


def test_every_metric_once_however_often_it_is_shipped(run: RunDir, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with MetricsFile(run.metrics) as metrics:
        for step in range(3):
            metrics.write(step, {"train/loss": step / 2, "none": float("inf")})
        assert ship(run, target(uri)) == 3
        assert ship(run, target(uri)) == 0
        metrics.write(3, {"train/loss": 1.5})
    state = json.loads((run.path / "mlflow.json").read_text())
    assert ship(run, target(uri), end="FINISHED") == 1
    (run.path / "mlflow.json").write_text(json.dumps(state))  # as after a kill between sending and saving
    ship(run, target(uri))
    assert history(uri, run, "train/loss") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    stored = MlflowClient(tracking_uri=uri).get_run(state["run_id"])
    assert stored.data.params["loss.topk"] == "64"
    assert stored.info.status == "FINISHED"


def test_steps_that_a_resumed_run_does_again_are_not_doubled(run: RunDir, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with MetricsFile(run.metrics) as metrics:
        for step in range(5):
            metrics.write(step, {"train/loss": step / 2})
    ship(run, target(uri), end="FAILED")
    removed = run.path / "metrics.cut_2.jsonl"
    assert cut_back(run.metrics, last_step=2, removed_to=removed) == 2
    assert cut_back(run.metrics, last_step=2, removed_to=removed) == 0
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1, 2]
    assert [row["step"] for row in read_metrics(removed)] == [3, 4]
    with MetricsFile(run.metrics) as metrics:
        for step in range(3, 7):
            metrics.write(step, {"train/loss": step / 2})
    assert ship(run, target(uri), begin=True) == 2
    assert history(uri, run, "train/loss") == [(step, step / 2) for step in range(7)]
    run_id = json.loads((run.path / "mlflow.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri=uri).get_run(run_id).info.status == "RUNNING"


@pytest.mark.parametrize("arrived", [True, False])
def test_what_was_on_its_way_when_a_process_was_killed_is_looked_up(run: RunDir, tmp_path: Path, arrived: bool) -> None:
    uri, state_file = f"sqlite:///{tmp_path}/mlflow.db", run.path / "mlflow.json"
    with MetricsFile(run.metrics) as metrics:
        metrics.write(0, {"train/loss": 0.5})
    ship(run, target(uri))
    state = json.loads(state_file.read_text())
    if arrived:
        with MetricsFile(run.metrics) as metrics:
            metrics.write(1, {"train/loss": 1.5})
        ship(run, target(uri))
        cut_back(run.metrics, last_step=0, removed_to=run.path / "cut.jsonl")
    state_file.write_text(json.dumps(state | {"sending": {"step": 1, "key": "train/loss"}}))
    with MetricsFile(run.metrics) as metrics:  # done again, at another time
        metrics.write(1, {"train/loss": 1.5})
    assert ship(run, target(uri)) == (0 if arrived else 1)
    assert history(uri, run, "train/loss") == [(0, 0.5), (1, 1.5)]


def test_a_run_that_was_made_just_before_a_kill_is_found_again(run: RunDir, tmp_path: Path) -> None:
    uri, state_file = f"sqlite:///{tmp_path}/mlflow.db", run.path / "mlflow.json"
    ship(run, target(uri))
    state = json.loads(state_file.read_text())
    state_file.write_text(json.dumps(state | {"run_id": None}))
    ship(run, target(uri))
    assert json.loads(state_file.read_text())["run_id"] == state["run_id"]


@pytest.mark.slow
def test_a_server_that_goes_away_delays_nothing_and_misses_nothing(run: RunDir, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    shipper = MlflowShipper(run, target(uri), period_s=0.2)
    slowest_s = 0.0
    try:
        with MetricsFile(run.metrics) as metrics:
            for step in range(40):
                if step == 10:
                    wait_until(lambda: len(history(uri, run, "train/loss")) >= 5)
                    stop(server)
                if step == 30:
                    server = start_server(tmp_path, port)
                begin = time.perf_counter()
                metrics.write(step, {"train/loss": float(step)})
                slowest_s = max(slowest_s, time.perf_counter() - begin)
                time.sleep(0.05)
        assert shipper.close(timeout_s=60)
        assert history(uri, run, "train/loss") == [(step, float(step)) for step in range(40)]
        assert slowest_s < 1.0  # a blocked call would take the server's time-out of ten seconds
    finally:
        stop(server)


def start_server(folder: Path, port: int) -> subprocess.Popen:
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder}/server.db", "--default-artifact-root", str(folder / "artifacts")],
        env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
    return server


def stop(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, 15)
        server.wait(20)


def wait_until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (OSError, json.JSONDecodeError):
            pass
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.2)
