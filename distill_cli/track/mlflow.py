"""MLflow, in a thread that ships what metrics.jsonl holds beyond a saved offset.

The thread belongs to the process that launched the ranks, not to a rank: a server that is slow or away cannot touch
training, and what ranks that died had recorded is still sent. What could not be sent is sent when the server answers
again. `mlflow.json` in the run's folder keeps the offset, so shipping can be repeated and
taken up by another process; sending a metric twice leaves one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.rundir import RunDir, write_json

log = logging.getLogger(__name__)

BATCH = 900
"""Metrics of one request; MLflow takes 1,000."""
MAX_VALUE = 6000
"""Characters of a parameter's value that MLflow keeps."""


@dataclass(frozen=True)
class MlflowTarget:
    """Where a run is recorded, and what it is called."""

    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, Any]


class MlflowShipper:
    """The thread. `close` waits a while for the rest to be sent."""

    def __init__(self, run: RunDir, target: MlflowTarget, *, period_s: float = 2.0) -> None:
        self._run, self._target, self._period_s = run, target, period_s
        self._closing = threading.Event()
        self._outcome = "FINISHED"
        self._sent = False
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, *, status: str = "FINISHED", timeout_s: float = 20.0) -> bool:
        """Whether everything was sent, the run's end included. `status` is MLflow's: FINISHED, FAILED or KILLED."""
        self._outcome = status
        self._closing.set()
        self._thread.join(timeout_s)
        if not self._sent:
            log.warning("MLflow at %s did not take all metrics; metrics.jsonl has them", self._target.uri)
        return self._sent

    def _loop(self) -> None:
        wait_s, warned = self._period_s, False
        # MLflow takes seconds to import: not while the ranks start.
        while self._run.metrics.stat().st_size == 0 and not self._closing.wait(self._period_s):
            pass
        while True:
            last = self._closing.wait(wait_s)
            try:
                ship(self._run, self._target, end=self._outcome if last else None)
                wait_s, self._sent, warned = self._period_s, last, False
            except Exception as error:  # whatever a server or a database raises: training goes on
                wait_s = min(wait_s * 2, 30.0)
                if not warned:
                    log.warning("MLflow at %s: %s; training goes on, metrics follow later", self._target.uri, error)
                    warned = True
            if last:
                return


def ship(run: RunDir, target: MlflowTarget, *, end: str | None = None) -> int:
    """Copies to MLflow what metrics.jsonl holds beyond the saved offset; the number of metrics sent.

    Args:
        end: the status to close the run with, once all is sent.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient  # seconds of import

    client = MlflowClient(tracking_uri=target.uri)
    state_file = run.path / "mlflow.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"run_id": None, "offset": 0}
    if state["run_id"] is None:
        state["run_id"] = _create(client, run, target)
        write_json(state_file, state)
    sent = 0
    for metrics, offset in _batches(run.metrics, state["offset"]):
        client.log_batch(state["run_id"], metrics=metrics)
        sent += len(metrics)
        state["offset"] = offset
        write_json(state_file, state)
    if end is not None:
        client.set_terminated(state["run_id"], status=end)
    return sent


def _create(client, run: RunDir, target: MlflowTarget) -> str:
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(target.experiment)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(target.experiment)
    created = client.create_run(experiment_id, run_name=target.run_name, tags={"distill.run_dir": str(run.path)})
    params = [Param(key, str(value)[:MAX_VALUE]) for key, value in target.params.items()]
    for begin in range(0, len(params), 100):
        client.log_batch(created.info.run_id, params=params[begin : begin + 100])
    return created.info.run_id


def _batches(path: Path, offset: int):
    """(metrics, offset behind them) by batches; a line still being written waits for the next time."""
    from mlflow.entities import Metric

    with path.open("rb") as file:
        file.seek(offset)
        batch = []
        for line in file:
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            offset += len(line)
            step, time_ms = row.pop("step"), int(row.pop("time") * 1000)
            batch += [Metric(key, value, time_ms, step) for key, value in row.items() if value is not None]
            if len(batch) >= BATCH:
                yield batch, offset
                batch = []
        if batch:
            yield batch, offset
