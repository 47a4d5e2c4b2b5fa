"""What every tracker must show of a run, read back with its own tools. A new one needs a reader here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import distill_cli
from distill_cli.folders.metrics_file import MetricsFile, cut_back
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.track.base import Tracker, tracker_names
from distill_cli.track.run_tracking import following
from distill_cli.track.shipper import ship
from tests.track.conftest import write_rows
from tests.track.readers import mlflow_values, recorded_values, same, tensorboard_values, wandb_values

READERS = {"mlflow": mlflow_values, "wandb": wandb_values, "tensorboard": tensorboard_values}
Trackers = dict[str, Callable[[], Tracker]]


def assert_all_there(run: RunDir, tracker: Tracker) -> None:
    """Every recorded value, once, and nothing besides. TensorBoard keeps seven digits."""
    assert same(READERS[tracker.name](run), recorded_values(run, *tracker.streams))


def test_every_tracker_has_a_reader(trackers: Trackers) -> None:
    assert READERS.keys() == trackers.keys() == set(tracker_names())


@pytest.mark.parametrize("name", tracker_names())
def test_every_value_arrives_once(name: str, run: RunDir, trackers: Trackers) -> None:
    build = trackers[name]
    write_rows(run, range(600))
    with closing(MetricsFile(run.path / "system.jsonl")) as system:
        system.write(0, {"system/cpu_utilization_percentage": 50.0})
    first = build()
    ship(run, first, begin=True)
    write_rows(run, range(600, 605))
    assert ship(run, first)[0] == 10
    ship(run, first, end="stopped")
    assert_all_there(run, first)
    write_rows(run, range(605, 607))  # resumed
    write_json(run.outcome, {"state": "finished"})
    again = build()
    ship(run, again, begin=True)
    ship(run, again, end="finished")
    assert_all_there(run, again)


@pytest.mark.parametrize("name", tracker_names())
def test_repeated_steps_stay_single(name: str, run: RunDir, trackers: Trackers) -> None:
    write_rows(run, range(5))
    killed = trackers[name]()
    ship(run, killed, begin=True)
    values = recorded_values(run, "metrics.jsonl")
    cut_back(run.metrics, last_step=2, removed_to=run.path / "cut.jsonl")
    write_rows(run, range(3, 4))
    state = run.path / f"{name}.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"is_sure": False}))  # killed in the middle of a call
    ship(run, again := trackers[name](), end="stopped")
    found = READERS[name](run)
    assert same(found, values) or same(found, recorded_values(run, "metrics.jsonl"))
    write_rows(run, range(4, 7))
    ship(run, again, end="finished")
    assert_all_there(run, again)


def test_three_trackers_at_once(run: RunDir, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    built = [build() for build in trackers.values()]
    with following(run, built):
        write_rows(run, range(4))
        write_json(run.outcome, {"state": "finished"})
    for tracker in built:
        assert_all_there(run, tracker)
    assert caplog.text == ""
    assert json.loads(run.trackers.read_text()).keys() == trackers.keys()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_refused(name: str, tmp_path: Path) -> None:
    """In an environment that has every package but this one."""
    installed, others = Path(pytest.__file__).parent.parent, tmp_path / "others"
    others.mkdir()
    for path in installed.iterdir():
        if not path.name.startswith(name):
            (others / path.name).symlink_to(path)
    env = {**os.environ, "PYTHONPATH": f"{others}:{Path(distill_cli.__file__).parent.parent}"}
    command = [sys.executable, "-S", "-m", "distill_cli", "plan", f"tracker=[mlflow,{name}]"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    fix = f'tracker.{name}.enabled: the package {name} is not installed; pip install "distill-cli[{name}]"'
    assert done.returncode == 2, done
    assert fix in done.stderr
    assert "Traceback" not in done.stderr
