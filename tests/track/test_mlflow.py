"""What MLflow receives of a run's folder, with a real SQLite store and a real server that is absent at times."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from distill_cli.checkpoint import store
from distill_cli.config.checks import config_problems
from distill_cli.config.compose import compose
from distill_cli.config.credentials import credentials_environment, without_credentials
from distill_cli.config.execution_schema import MlflowConfig, TrackerConfig
from distill_cli.config.schema import Config
from distill_cli.config.variation import config_text, load_config, save_config
from distill_cli.errors import ConfigError
from distill_cli.folders.metrics_file import MetricsFile, cut_back, read_metrics
from distill_cli.folders.run_dir import Element, RunDir, SweepDir, create, element_name, write_json
from distill_cli.jobs.preflight import preflight
from distill_cli.report.read import read_config
from distill_cli.track.base import FILES, STREAMS, tracker_problems
from distill_cli.track.facts import models, run_tags
from distill_cli.track.mlflow import mlflow_tags, whole_uri
from distill_cli.track.run_tracking import track, tracking
from distill_cli.track.shipper import Shipper, ship
from distill_cli.track.system import SystemSampler
from tests.track.conftest import history, state_of, tracker
from tests.track.server import free_port, start_server, stop, wait_until


def test_cut_off_lines_are_not_read(run: RunDir) -> None:
    with closing(MetricsFile(run.metrics)) as metrics:
        metrics.write(1, {"a": 0.5, "b": float("nan"), "c": 3})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "a"')
    (row,) = read_metrics(run.metrics)
    assert (row["step"], row["a"], row["b"], row["c"]) == (1, 0.5, None, 3)


def test_every_metric_arrives_once(run: RunDir, uri: str) -> None:
    with closing(MetricsFile(run.metrics)) as metrics:
        for step in range(3):
            metrics.write(step, {"train/loss": step / 2, "none": float("inf")})
        assert ship(run, tracker(run, uri))[0] == 3
        assert ship(run, tracker(run, uri)) == (0, 0)
        metrics.write(3, {"train/loss": 1.5})
    state = state_of(run)
    assert ship(run, tracker(run, uri), end="finished")[0] == 1
    (run.path / "mlflow.json").write_text(json.dumps(state))  # as after a kill between sending and saving
    ship(run, tracker(run, uri))
    assert history(uri, run, "train/loss") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    stored = MlflowClient(tracking_uri=uri).get_run(state["run_id"])
    assert stored.data.params["loss.topk"] == "64"
    assert stored.info.status == "FINISHED"


def test_repeated_steps_are_not_doubled(run: RunDir, uri: str) -> None:
    with closing(MetricsFile(run.metrics)) as metrics:
        for step in range(5):
            metrics.write(step, {"train/loss": step / 2})
    ship(run, tracker(run, uri), end="failed")
    removed = run.path / "metrics.cut_2.jsonl"
    assert cut_back(run.metrics, last_step=2, removed_to=removed) == 2
    assert cut_back(run.metrics, last_step=2, removed_to=removed) == 0
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1, 2]
    assert [row["step"] for row in read_metrics(removed)] == [3, 4]
    with closing(MetricsFile(run.metrics)) as metrics:
        for step in range(3, 7):
            metrics.write(step, {"train/loss": step / 2})
    assert ship(run, tracker(run, uri), begin=True)[0] == 2
    assert history(uri, run, "train/loss") == [(step, step / 2) for step in range(7)]
    run_id = state_of(run)["run_id"]
    assert MlflowClient(tracking_uri=uri).get_run(run_id).info.status == "RUNNING"


@pytest.mark.parametrize("arrived", [True, False])
def test_interrupted_requests_are_looked_up(run: RunDir, uri: str, arrived: bool) -> None:
    state_file = run.path / "mlflow.json"
    with closing(MetricsFile(run.metrics)) as metrics:
        metrics.write(0, {"train/loss": 0.5})
    ship(run, tracker(run, uri))
    state = state_of(run)
    if arrived:
        with closing(MetricsFile(run.metrics)) as metrics:
            metrics.write(1, {"train/loss": 1.5})
        ship(run, tracker(run, uri))
        cut_back(run.metrics, last_step=0, removed_to=run.path / "cut.jsonl")
    state_file.write_text(json.dumps(state | {"is_sure": False}))
    with closing(MetricsFile(run.metrics)) as metrics:  # done again, at another time
        metrics.write(1, {"train/loss": 1.5})
    assert ship(run, tracker(run, uri))[0] == (0 if arrived else 1)
    assert history(uri, run, "train/loss") == [(0, 0.5), (1, 1.5)]


def test_a_checkpoint_identifies_the_run(run: RunDir, uri: str) -> None:
    checkpoint = run.checkpoints / "step_1"
    checkpoint.mkdir(parents=True)
    with closing(MetricsFile(run.metrics)) as metrics:
        metrics.write(1, {"train/loss": 0.5})
        ship(run, tracker(run, uri))
        before = state_of(run)["run_id"]
        identity = {name: value for name, value in state_of(run).items() if name in ("uri", "experiment", "token")}
        write_json(checkpoint / store.STATE, {"step": 1, "trackers": {"mlflow": identity}})
        write_json(checkpoint / store.MANIFEST, {"files": {}})
        metrics.write(2, {"train/loss": 0.25})
        ship(run, tracker(run, uri))
    (run.path / "mlflow.json").unlink()
    cut_back(run.metrics, last_step=1, removed_to=run.path / "cut.jsonl")
    sent = []
    with closing(MetricsFile(run.metrics)) as metrics:  # step 2 again, which MLflow has, and one more
        for step in (1, 2, 3):
            if step > 1:
                metrics.write(step, {"train/loss": 0.5 / step})
            sent.append(ship(run, tracker(run, uri))[0])
    assert sent == [0, 0, 1]
    assert state_of(run)["run_id"] == before
    assert [step for step, _ in history(uri, run, "train/loss")] == [1, 2, 3]


def test_a_run_is_found_by_token(run: RunDir, uri: str) -> None:
    state_file = run.path / "mlflow.json"
    ship(run, tracker(run, uri))
    state = state_of(run)
    state_file.write_text(json.dumps({"token": state["token"], "uri": state["uri"], "experiment": state["experiment"]}))
    ship(run, tracker(run, uri))
    assert state_of(run)["run_id"] == state["run_id"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_absent_server_misses_nothing(run: RunDir, tmp_path: Path) -> None:
    """Absent at the start, there, gone in the middle, there again at the end: everything of the folder arrives."""
    uri = f"http://127.0.0.1:{free_port()}"
    wanted = tracker(run, uri, log_model=True)
    shipper, server, slowest_s = Shipper(run, wanted, period_s=0.2), None, 0.0
    try:
        with closing(MetricsFile(run.metrics)) as metrics, closing(MetricsFile(run.path / "system.jsonl")) as system:
            for step in range(40):
                if step == 10:
                    server = start_server(tmp_path, uri)
                    wait_until(lambda: len(history(uri, run, "train/loss")) >= 5)
                if step == 20:
                    stop(server)
                    write_rollouts(run, 20)
                if step == 30:
                    server = start_server(tmp_path, uri)
                begin = time.perf_counter()
                metrics.write(step, {"train/loss": float(step), "val/accuracy": step / 40})
                system.write(step, {"system/cpu_utilization_percentage": 50.0 + step})
                slowest_s = max(slowest_s, time.perf_counter() - begin)
                time.sleep(0.05)
        run.student.mkdir()
        (run.student / "model.safetensors").write_bytes(b"weights")
        write_json(run.outcome, {"state": "finished"})
        shipper.end("finished", timeout_s=60)
        assert shipper.wait()
        assert slowest_s < 5.0  # a blocked call would take the server's time-out of ten seconds
        assert_all_there(uri, run, logs_model=True)
        assert ship(run, wanted) == (0, 0)
    finally:
        if server is not None:
            stop(server)


def assert_all_there(uri: str, run: RunDir, *, logs_model: bool = False) -> None:
    """Every metric, parameter, tag, input and file of a finished run's folder, and nothing besides."""
    config = load_config(run.config)
    client, run_id = MlflowClient(tracking_uri=uri), state_of(run)["run_id"]
    stored = client.get_run(run_id)
    rows = [row for stream in STREAMS if (run.path / stream).exists() for row in read_metrics(run.path / stream)]
    local = {(key, row["step"], value) for row in rows for key, value in row.items() if key not in ("step", "time")}
    remote = [(key, m.step, m.value) for key in stored.data.metrics for m in client.get_metric_history(run_id, key)]
    assert sorted(remote) == sorted(local)
    assert stored.data.params == {key: str(value)[:6000] for key, value in read_config(run).items()}
    assert stored.data.tags.items() >= mlflow_tags(run_tags(config, run)).items()
    assert stored.info.status == "FINISHED"
    files = [file for pattern in FILES for file in run.path.glob(pattern)]
    names = [str(file.relative_to(run.path)) for file in files]
    if logs_model:
        files += run.student.iterdir()
        names += [f"model/{file.name}" for file in run.student.iterdir()]
    assert sorted(names) == sorted(artifacts(client, run_id))
    for file, name in zip(files, names, strict=True):
        assert Path(client.download_artifacts(run_id, name)).read_bytes() == file.read_bytes()
    found = [client.get_logged_model(model.model_id).tags["path"] for model in stored.inputs.model_inputs]
    assert sorted(found) == sorted(models(config).values())


def artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> list[str]:
    found = []
    for entry in client.list_artifacts(run_id, path):
        found += artifacts(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return found


def write_rollouts(run: RunDir, step: int) -> None:
    run.rollouts.mkdir(exist_ok=True)
    (run.rollouts / f"step_{step}.parquet").write_bytes(os.urandom(1000))


def make_sweep(folder: Path, *, number: int) -> SweepDir:
    swept = [[f"loss.topk={topk}", f"loss.kl_weight={weight}"] for topk in (32, 64) for weight in (0.1, 0.3, 0.5, 0.7)]
    sweep = SweepDir(folder)
    names = [element_name(index, words) for index, words in enumerate(swept)][:number]
    elements = [Element(index, name, swept[index]) for index, name in enumerate(names)]
    sweep.write(command=["distill", "-m"], elements=elements)
    (job,) = compose([])
    for element in elements:
        run = create(folder / element.folder, command=["distill"])
        save_config(job.config, run.config)
        with closing(MetricsFile(run.metrics)) as metrics:
            for step in range(5):
                metrics.write(step, {"train/loss": step + element.index / 8})
        write_json(run.outcome, {"state": "finished"})
    return sweep


@pytest.mark.slow
@pytest.mark.exhaustive
def test_eight_runs_share_one_parent(tmp_path: Path) -> None:
    sweep, uri = make_sweep(tmp_path / "runs" / "sweep", number=8), f"sqlite:///{tmp_path}/runs/mlflow.db"
    commands = [
        [sys.executable, "-m", "distill_cli", "track", "sync", f"--uri={uri}", str(path)] for path in runs(sweep)
    ]
    syncs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    output = [process.communicate(timeout=500)[0].decode() for process in syncs]
    assert [process.returncode for process in syncs] == [0] * 8, output
    client = MlflowClient(tracking_uri=uri)
    stored = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    (parent,) = [run for run in stored if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in stored if run is not parent]
    assert parent.data.params == {"loss.topk": "32, 64", "loss.kl_weight": "0.1, 0.3, 0.5, 0.7"}
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {run.info.status for run in stored} == {"FINISHED"}
    assert sorted(child.info.run_name for child in children) == sorted(path.name for path in runs(sweep))
    for path in runs(sweep):
        assert_all_there(uri, RunDir(path))
    again = subprocess.run([*commands[0][:-1], str(sweep.path)], capture_output=True, text=True, check=True).stdout
    assert again.count(": 0 metrics, 0 files sent") == 8


def runs(sweep: SweepDir) -> list[Path]:
    return [sweep.path / element.folder for element in sweep.elements()]


def test_each_server_gets_everything_once(run: RunDir, uri: str, tmp_path: Path) -> None:
    uris = [uri, f"sqlite:///{tmp_path}/b.db"]
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "b.db")
    with closing(MetricsFile(run.metrics)) as metrics:
        metrics.write(0, {"train/loss": 0.5})
    sent = [ship(run, tracker(run, uri))[0] for uri in (uris[0], uris[1], uris[0])]
    assert sent == [1, 1, 0]
    assert history(uris[0], run, "train/loss") == [(0, 0.5)]


def test_sync_takes_an_untracked_run(run: RunDir, uri: str, config: Config, capsys: pytest.CaptureFixture) -> None:
    save_config(replace(config, tracker=TrackerConfig()), run.config)
    with closing(MetricsFile(run.metrics)) as metrics:
        metrics.write(0, {"train/loss": 0.5})
    with pytest.raises(ConfigError, match="tracker.mlflow.uri: must be an address"):
        track([run.path], uri="localhost:5000")
    assert track([run.path], uri=uri) == 0
    assert f"{run.path}: 1 metrics, 3 files sent to {uri}, run {state_of(run)['run_id']}" in capsys.readouterr().out
    assert track([run.path]) == 0  # where it was sent before
    assert f"{run.path}: 0 metrics, 0 files sent to {uri}" in capsys.readouterr().out
    assert history(uri, run, "train/loss") == [(0, 0.5)]


def test_data_and_models_are_inputs(run: RunDir, uri: str, config: Config, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 2)
    there, gone = ({"source": "jsonl", "path": str(path)} for path in (file, tmp_path / "gone.jsonl"))
    save_config(replace(config, data=replace(config.data, train=there, validation=gone)), run.config)
    for _ in range(2):
        ship(run, tracker(run, uri))
    inputs = MlflowClient(tracking_uri=uri).get_run(state_of(run)["run_id"]).inputs
    found = {entry.tags[0].value: entry.dataset for entry in inputs.dataset_inputs}
    assert found["training"].name == "train.jsonl"
    assert json.loads(found["training"].source) == there
    assert json.loads(found["training"].profile) == {"num_rows": 2}
    assert json.loads(found["validation"].profile) == {}
    assert found["training"].digest != found["validation"].digest
    assert len(inputs.model_inputs) == 2


def test_no_password_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://me:pa55w0rd@127.0.0.1:{free_port()}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = [f"tracker.mlflow.uri={uri}", "tracker.mlflow.experiment=mine"]
    (job,) = compose(words)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert config_problems(job.config) == []
    run = create(tmp_path / "runs" / "a", command=["distill", *words], config=config_text(job.config))
    with tracking(preflight(job.config), run):
        pass
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"pa55w0rd" not in path.read_bytes(), path
    assert "pa55w0rd" not in str(job)
    written = load_config(run.config).tracker.mlflow.uri
    assert written == without_credentials(uri) == whole_uri(written)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", credentials_environment(job.config)["MLFLOW_TRACKING_URI"])
    assert whole_uri(written) == uri


def test_credentials_leave_a_text() -> None:
    assert without_credentials("postgresql://h/db?password=x&a=b http://u:p@s@h") == (
        "postgresql://h/db?password=***&a=b http://h"
    )


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "runs/mlruns", "file:///tmp/a", "http://u:pa/55@host:1", "http://h:x"]
)
def test_a_wrong_address_is_not_quoted(uri: str) -> None:
    config = Config(tracker=TrackerConfig(mlflow=MlflowConfig(enabled=True, uri=uri)))
    (problem,) = tracker_problems(config)
    assert problem.startswith("tracker.mlflow.uri: ")
    assert uri not in problem


def test_machine_load_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "system.jsonl"
    for _ in range(2):
        SystemSampler(file, use_gpus=False, period_s=0.05).close()
    rows = read_metrics(file)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 2
    assert 0 < rows[-1]["system/system_memory_usage_percentage"] <= 100
