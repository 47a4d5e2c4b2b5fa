"""Several trackers at once, one of them in memory: each receives everything, whatever happens to the others."""

import time
from contextlib import closing

import pytest

from distill_cli.checkpoint import store
from distill_cli.errors import Stopped
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.track.base import FILES, STREAMS
from distill_cli.track.run_tracking import following
from distill_cli.track.shipper import ship
from tests.track.conftest import history, tracker


class Memory:
    """A tracker that keeps what it gets. `breaks` is the method that raises: `log` does after it has kept the rows."""

    name, label, place, page, logs_model = "memory", "Memory", "here", "nowhere", False
    streams, files, has_one_sender = STREAMS, FILES, False

    def __init__(self, *, breaks: str = "") -> None:
        self.breaks, self.runs, self.queries = breaks, 0, 0
        self.metrics: list[tuple[str, int]] = []
        self.received: list[str] = []
        self.status = ""

    def _break(self, method: str) -> None:
        if method == self.breaks:
            raise RuntimeError("http://me:pa55w0rd@host is broken")

    def identity(self, known):
        return {"token": known.get("token", "mine"), "run_id": known.get("run_id")}

    def open(self, identity, *, running):
        self._break("open")
        self.status = "running" if running else self.status
        if identity["run_id"] is None:
            identity["run_id"], self.runs = "1", self.runs + 1

    def logged(self):
        self.queries += 1
        return set(self.metrics)

    def log(self, rows):
        self.metrics += [(key, row["step"]) for row in rows for key in row if key not in ("step", "time")]
        self._break("log")

    def artifact(self, file, name):
        self._break("artifact")
        self.received.append(name)

    def close(self, status):
        self.status = status


def train(run: RunDir, *, steps: int) -> None:
    with closing(MetricsFile(run.metrics)) as metrics:
        for step in range(steps):
            metrics.write(step, {"train/loss": step / 2})
    write_json(run.outcome, {"state": "finished"})


def losses(double: Memory) -> list[int]:
    return [step for key, step in double.metrics if key == "train/loss"]


@pytest.mark.parametrize("breaks", ["", "open", "log", "artifact"])
def test_each_tracker_fails_by_itself(run: RunDir, uri: str, breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    double, began = Memory(breaks=breaks), time.monotonic()
    with following(run, [double, tracker(run, uri)]):
        train(run, steps=3)
        trained = time.monotonic()
    assert trained - began < 5.0  # not the 30 s that the end of a run waits
    assert [step for step, _ in history(uri, run, "train/loss")] == [0, 1, 2]
    assert read_json(run.trackers)["memory"] == {"token": "mine", "run_id": None}
    if not breaks:
        assert (losses(double), double.status, double.runs) == ([0, 1, 2], "finished", 1)
        assert {"config.yaml", "outcome.json"} <= set(double.received)
        assert caplog.text == ""
        return
    assert "Memory at here: http://host is broken; the run goes on" in caplog.text
    assert (f"distill track sync {run.path}" in caplog.text) == (breaks != "log")  # all that broke had arrived
    assert "MLflow" not in caplog.text
    double.breaks = ""
    ship(run, double, end="finished")  # as `distill track sync` does
    assert (losses(double), double.status, double.runs) == ([0, 1, 2], "finished", 1)


def test_a_broken_request_is_looked_up(run: RunDir) -> None:
    double = Memory(breaks="log")
    train(run, steps=2)
    with pytest.raises(RuntimeError):
        ship(run, double)
    double.breaks = ""
    assert ship(run, double)[0] == 0  # all of it had arrived
    assert losses(double) == [0, 1]
    queries = double.queries
    assert ship(run, double) == (0, 0)
    assert double.queries == queries


def test_a_checkpoint_identifies_the_run(run: RunDir) -> None:
    """The newest checkpoint holds what the run is found again by."""
    double = Memory()
    train(run, steps=2)
    ship(run, double)
    checkpoint = run.checkpoints / "step_1"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / store.STATE, {"step": 1, "trackers": {"memory": {"token": "mine", "run_id": "1"}}})
    write_json(checkpoint / store.MANIFEST, {"files": {}})
    (run.path / "memory.json").rename(run.path / "away.json")
    assert ship(run, double)[0] == 0
    assert (double.runs, losses(double)) == (1, [0, 1])


def test_a_stopped_run_waits_little(run: RunDir) -> None:
    double, began = Memory(breaks="open"), time.monotonic()
    train(run, steps=1)
    with pytest.raises(Stopped), following(run, [double]):
        raise Stopped(15)
    assert time.monotonic() - began < 20
