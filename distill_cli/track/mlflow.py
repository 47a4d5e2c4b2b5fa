"""MLflow, in a thread that ships the steps of metrics.jsonl that it has not shipped yet.

The thread belongs to the process that launched the ranks, not to a rank: a server that is slow or away cannot touch
training, and what ranks that died had recorded is still sent. What could not be sent is sent when the server answers
again. `mlflow.json` in the run's folder keeps the last step that was sent, so that another process can take over, and a
step that a resumed run goes through once more is not sent once more. What was on its way when a process was killed is
looked up.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.rundir import RunDir, write_json
from distill_cli.track.recorder import read_metrics

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
        wait_s, warned, begin = self._period_s, False, True
        # MLflow takes seconds to import: not while the ranks start.
        while self._run.metrics.stat().st_size == 0 and not self._closing.wait(self._period_s):
            pass
        while True:
            last = self._closing.wait(wait_s)
            try:
                ship(self._run, self._target, begin=begin, end=self._outcome if last else None)
                wait_s, self._sent, warned, begin = self._period_s, last, False, False
            except Exception as error:  # whatever a server or a database raises: training goes on
                wait_s = min(wait_s * 2, 30.0)
                if not warned:
                    log.warning("MLflow at %s: %s; training goes on, metrics follow later", self._target.uri, error)
                    warned = True
            if last:
                return


def ship(run: RunDir, target: MlflowTarget, *, begin: bool = False, end: str | None = None) -> int:
    """Copies to MLflow the steps that metrics.jsonl holds beyond the last that was sent; the number of metrics sent.

    Args:
        begin: the run is running, whatever it was marked as before.
        end: the status to close the run with, once all is sent.
    """
    client, state_file = _client(target), run.path / "mlflow.json"
    state = {"run_id": None, "token": uuid.uuid4().hex, "step": -1, "sending": None}
    if state_file.exists():
        state |= json.loads(state_file.read_text())
    if state["run_id"] is None:
        write_json(state_file, state)  # by its token a run is found again that was made just before a kill
        state["run_id"] = _find(client, target, token=state["token"]) or _create(
            client, run, target, token=state["token"]
        )
        write_json(state_file, state)
    elif begin:
        client.update_run(state["run_id"], status="RUNNING")
    if state["sending"] is not None and _has(client, state["run_id"], **state["sending"]):
        state["step"] = state["sending"]["step"]
    sent = 0
    for metrics, step in _batches(run.metrics, after_step=state["step"]):
        write_json(state_file, state | {"sending": {"step": step, "key": metrics[-1].key}})
        client.log_batch(state["run_id"], metrics=metrics)
        sent += len(metrics)
        state |= {"step": step, "sending": None}
        write_json(state_file, state)
    if end is not None:
        client.set_terminated(state["run_id"], status=end)
    return sent


def _client(target: MlflowTarget):
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient  # seconds of import

    return MlflowClient(tracking_uri=target.uri)


def _has(client, run_id: str, *, step: int, key: str) -> bool:
    """Whether a batch arrived, which MLflow takes whole or not at all: by its last metric."""
    return any(metric.step == step for metric in client.get_metric_history(run_id, key))


def _find(client, target: MlflowTarget, *, token: str) -> str | None:
    experiment = client.get_experiment_by_name(target.experiment)
    ids = [experiment.experiment_id] if experiment else []
    found = client.search_runs(ids, filter_string=f"tags.`distill.token` = '{token}'") if ids else []
    return found[0].info.run_id if found else None


def _create(client, run: RunDir, target: MlflowTarget, *, token: str) -> str:
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(target.experiment)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(target.experiment)
    tags = {"distill.run_dir": str(run.path), "distill.token": token}
    created = client.create_run(experiment_id, run_name=target.run_name, tags=tags)
    params = [Param(key, str(value)[:MAX_VALUE]) for key, value in target.params.items()]
    for begin in range(0, len(params), 100):
        client.log_batch(created.info.run_id, params=params[begin : begin + 100])
    return created.info.run_id


def _batches(path: Path, *, after_step: int):
    """(metrics, their last step) by batches, of whole steps."""
    from mlflow.entities import Metric

    batch, step = [], after_step
    for row in read_metrics(path, after_step=after_step):
        step, time_ms = row.pop("step"), int(row.pop("time") * 1000)
        batch += [Metric(key, value, time_ms, step) for key, value in row.items() if value is not None]
        if len(batch) >= BATCH:
            yield batch, step
            batch = []
    if batch:
        yield batch, step
