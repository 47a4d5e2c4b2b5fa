"""MLflow, in a thread that ships what a run's folder holds and MLflow does not have yet.

The thread belongs to the process that launched the ranks, not to a rank: a server that is slow or away cannot touch
training, and what ranks that died had recorded is still sent. What could not be sent is sent when the server answers
again, or by `distill track sync`. `mlflow.json` in the run's folder keeps what was sent, so that another process can
take over, and a step that a resumed run goes through once more is not sent once more. What was on its way when a
process was killed is looked up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_cli.config.credentials import without_credentials
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, SweepDir, write_json
from distill_cli.track import client as mlflow_client
from distill_cli.track.inputs import DatasetSource, log_inputs

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

BATCH = 900
"""Metrics of one request; MLflow takes 1,000."""
STREAMS = ("metrics.jsonl", "system.jsonl")
ARTIFACTS = ("config.yaml", "command.txt", "env.json", "outcome.json", "report.html", "rollouts/*.parquet")
"""Files of a run that MLflow keeps a copy of."""


@dataclass(frozen=True)
class MlflowTarget:
    """Where a run is recorded, and as what."""

    uri: str
    """With the credentials, if it needs any; it is never written down."""
    experiment: str
    run_name: str
    artifacts: Path
    """Where a new experiment's artifacts go if no server decides that."""
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[DatasetSource] = ()
    models: Mapping[str, str] = field(default_factory=dict)
    """Path and revision of each role's model."""
    log_model: bool = False
    """Log the trained student's folder too."""
    sweep: SweepDir | None = None
    """The sweep that the run belongs to; its parent is made by whichever run comes first."""

    @property
    def shown_uri(self) -> str:
        return without_credentials(self.uri)


@dataclass
class Shipped:
    """What one call of `ship` sent."""

    metrics: int = 0
    artifacts: int = 0


class MlflowShipper:
    """The thread. `close` waits a while for the rest to be sent."""

    def __init__(self, run: RunDir, target: MlflowTarget, *, period_s: float = 2.0) -> None:
        self._run, self._target, self._period_s = run, target, period_s
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._deadline = float("inf")
        self._is_away = False
        self._sent = False
        State.of(run, target).save()  # where it was meant to go, should the server never answer
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, *, status: str = "FINISHED", timeout_s: float = 30.0) -> bool:
        """Whether everything was sent, the run's end included. `status` is MLflow's: FINISHED, FAILED or KILLED.

        A server that has been away is given three seconds: nobody waits for it.
        """
        self._status = status
        timeout_s = min(timeout_s, 3.0) if self._is_away else timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        if not self._sent:
            log.warning(
                "MLflow at %s has not taken everything; distill track sync %s sends the rest",
                self._target.shown_uri,
                self._run.path,
            )
        return self._sent

    def _loop(self) -> None:
        wait_s, begin = self._period_s, True
        # MLflow takes seconds to import: not while the ranks start.
        while self._run.metrics.stat().st_size == 0 and not self._closing.wait(self._period_s):
            pass
        while True:
            last = self._closing.wait(wait_s)
            try:
                ship(self._run, self._target, begin=begin, end=self._status if last else None)
                wait_s, begin, self._is_away, self._sent = self._period_s, False, False, last
            except Exception as error:  # whatever a server or a database raises: training goes on
                wait_s = min(wait_s * 2, 30.0)
                if not self._is_away:
                    log.warning("MLflow at %s: %s; the run goes on, it follows later", *self._told(error))
                self._is_away = True
                if last and not self._target.uri.startswith("sqlite:"):  # a database is busy, a server is away
                    self._deadline = min(self._deadline, time.monotonic() + 3.0)
                if last and time.monotonic() < self._deadline:
                    time.sleep(0.5)
                    continue
            if last:
                return

    def _told(self, error: Exception) -> tuple[str, str]:
        return self._target.shown_uri, reason(error)


def reason(error: Exception) -> str:
    """One line, without the credentials that an error may quote."""
    lines = str(error).strip().splitlines()
    return without_credentials(lines[0] if lines else type(error).__name__)[:300]


@dataclass
class State:
    """What MLflow has of a run: mlflow.json."""

    file: Path
    uri: str
    experiment: str
    token: str
    run_id: str | None = None
    step: dict[str, int] = field(default_factory=dict)
    """The last step that was sent of each of `STREAMS`."""
    sending: dict[str, Any] | None = None
    """The last metric of a batch that is on its way."""
    described: str = ""
    """Digest of the parameters and tags that were sent."""
    inputs: bool = False
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    """Size and time of each file that was sent."""
    end: str | None = None
    """The status that the run is to be closed with, or was."""

    @classmethod
    def of(cls, run: RunDir, target: MlflowTarget) -> State:
        """As it was left; of another server or experiment only the token is kept."""
        file, wanted = run.path / "mlflow.json", (target.shown_uri, target.experiment)
        saved = json.loads(file.read_text()) if file.exists() else {}
        token = saved.pop("token", None) or uuid.uuid4().hex
        if (saved.get("uri"), saved.get("experiment")) != wanted:
            saved = {"end": saved.get("end")}
        saved = {name: value for name, value in saved.items() if name in cls.__dataclass_fields__}
        return cls(**{**saved, "file": file, "uri": wanted[0], "experiment": wanted[1], "token": token})

    def save(self) -> None:
        write_json(self.file, {name: value for name, value in vars(self).items() if name != "file"})


def ship(run: RunDir, target: MlflowTarget, *, begin: bool = False, end: str | None = None) -> Shipped:
    """Sends what the run's folder holds and MLflow does not have. Done again, it sends nothing.

    Args:
        begin: the run is running, whatever it was marked as before.
        end: the status to close the run with, once its metrics are sent.
    """
    with mlflow_client.locked(run.path / ".mlflow.lock"):
        state, shipped = State.of(run, target), Shipped()
        if end is not None:
            state.end = end
            state.save()
        client = mlflow_client.connect(target.uri)
        there = _open_run(client, target, state, begin=begin and end is None)
        _describe(client, target, state)
        for stream in STREAMS:
            if (run.path / stream).exists():
                shipped.metrics += _send_metrics(client, run.path / stream, state, there)
        if end is not None:
            client.set_terminated(state.run_id, status=end)
            if target.sweep is not None:
                close_parent(client, target, element=run.path.name, status=end)
        shipped.artifacts = _send_artifacts(client, run, target, state)
        return shipped


def _open_run(client: MlflowClient, target: MlflowTarget, state: State, *, begin: bool) -> set[tuple[str, int]]:
    """Sets `state.run_id`; the metrics and steps that a run has of which nothing else is known."""
    there: set[tuple[str, int]] = set()
    if state.run_id is None:
        state.save()  # by its token a run is found again that was made just before a kill
        experiment = mlflow_client.experiment_id(client, target.experiment, artifacts=target.artifacts)
        parent = open_parent(client, target, experiment) if target.sweep is not None else None
        if parent is not None and begin:
            reopen_parent(client, target)  # it has ended with the runs that were known until now
        made = mlflow_client.make_run(client, experiment, name=target.run_name, token=state.token, parent=parent)
        state.run_id = made.run_id
        there = set() if made.is_new else _everything(client, made.run_id)
        state.save()
    elif begin:
        client.update_run(state.run_id, status="RUNNING")
        if target.sweep is not None:
            reopen_parent(client, target)
    if state.sending is not None and _has(client, state.run_id, state.sending):
        state.step[state.sending["stream"]] = state.sending["step"]
    return there


def _describe(client: MlflowClient, target: MlflowTarget, state: State) -> None:
    told = json.dumps([dict(target.params), dict(target.tags)], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode()).hexdigest()
    if state.described != digest:
        mlflow_client.describe(client, state.run_id, params=target.params, tags=target.tags)
        state.described = digest
        state.save()
    if not state.inputs:
        log_inputs(client, state.run_id, datasets=target.datasets, models=target.models)
        state.inputs = True
        state.save()


def _send_metrics(client: MlflowClient, file: Path, state: State, there: set[tuple[str, int]]) -> int:
    sent = 0
    for metrics, step in _batches(file, after_step=state.step.get(file.name, -1)):
        new = [metric for metric in metrics if (metric.key, metric.step) not in there]
        if new:
            state.sending = {"stream": file.name, "step": step, "key": new[-1].key, "last": new[-1].step}
            state.save()
            client.log_batch(state.run_id, metrics=new)
        sent += len(new)
        state.step[file.name], state.sending = step, None
        state.save()
    # What MLflow has beyond that comes again, where the run went back to a checkpoint.
    known = [step for key, step in there if key.startswith("system/") == (file.name == "system.jsonl")]
    if known and max(known) > state.step.get(file.name, -1):
        state.step[file.name] = max(known)
        state.save()
    return sent


def _has(client: MlflowClient, run_id: str, sending: Mapping[str, Any]) -> bool:
    """Whether a batch arrived, which MLflow takes whole or not at all: by its last metric."""
    return any(metric.step == sending["last"] for metric in client.get_metric_history(run_id, sending["key"]))


def _everything(client: MlflowClient, run_id: str) -> set[tuple[str, int]]:
    keys = client.get_run(run_id).data.metrics
    return {(key, metric.step) for key in keys for metric in client.get_metric_history(run_id, key)}


def _batches(path: Path, *, after_step: int) -> Iterator[tuple[list, int]]:
    """(metrics, their last step) by batches, of whole steps."""
    from mlflow.entities import Metric

    batch, step = [], after_step
    for row in read_metrics(path, after_step=after_step):
        step, time_ms = row.pop("step"), int(row.pop("time") * 1000)
        if batch and len(batch) + len(row) > BATCH:
            yield batch, batch[-1].step
            batch = []
        batch += [Metric(key, value, time_ms, step) for key, value in row.items() if value is not None]
    if batch:
        yield batch, step


def _send_artifacts(client: MlflowClient, run: RunDir, target: MlflowTarget, state: State) -> int:
    """Files that are new, or other than when they were sent."""
    patterns = (*ARTIFACTS, *(["student/**/*"] if target.log_model and run.outcome.exists() else []))
    sent = 0
    for file in (file for pattern in patterns for file in sorted(run.path.glob(pattern)) if file.is_file()):
        name, stat = str(file.relative_to(run.path)), file.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        if state.artifacts.get(name) != mark:
            folder = file.relative_to(run.path).parent.as_posix().replace("student", "model", 1)
            client.log_artifact(state.run_id, str(file), None if folder == "." else folder)
            state.artifacts[name] = mark
            state.save()
            sent += 1
    return sent


def open_parent(client: MlflowClient, target: MlflowTarget, experiment: str) -> str:
    """The sweep's own run, made by whichever of its runs comes first; its parameters are the grid."""
    with mlflow_client.locked(target.sweep.path / ".mlflow.lock"):
        state = _parent_state(target)
        if state.run_id is None:
            state.save()
            name = target.sweep.path.name
            made = mlflow_client.make_run(client, experiment, name=name, token=state.token, parent=None)
            tags = {"distill.sweep_dir": str(target.sweep.path), "distill.runs": len(target.sweep.elements())}
            mlflow_client.describe(client, made.run_id, params=grid(target.sweep), tags=tags)
            client.log_artifact(made.run_id, str(target.sweep.file))
            state.run_id = made.run_id
            state.save()
        return state.run_id


def reopen_parent(client: MlflowClient, target: MlflowTarget) -> None:
    """A run of the sweep goes on."""
    with mlflow_client.locked(target.sweep.path / ".mlflow.lock"):
        state = _parent_state(target)
        if state.run_id is not None and state.end is not None:
            client.update_run(state.run_id, status="RUNNING")
            state.end = None
            state.save()


def close_parent(client: MlflowClient, target: MlflowTarget, *, element: str, status: str) -> None:
    """Notes how a run of the sweep ended; with the last of them the sweep's own run ends."""
    with mlflow_client.locked(target.sweep.path / ".mlflow.lock"):
        state, ended_file = _parent_state(target), target.sweep.path / ".mlflow_ended.json"
        ended = json.loads(ended_file.read_text()) if ended_file.exists() else {}
        ended[element] = status
        write_json(ended_file, ended)
        names = [element.folder for element in target.sweep.elements()]
        if state.run_id is None or any(name not in ended for name in names):
            return
        statuses = {ended[name] for name in names}
        state.end = next(status for status in ("FAILED", "KILLED", "FINISHED") if status in statuses)
        client.set_terminated(state.run_id, status=state.end)
        state.save()


def _parent_state(target: MlflowTarget) -> State:
    return State.of(RunDir(target.sweep.path), target)


def grid(sweep: SweepDir) -> dict[str, str]:
    """Each swept key, with its values in order, or the range that is searched."""
    if space := sweep.space():
        return space
    values: dict[str, dict[str, None]] = {}
    for element in sweep.elements():
        for override in element.overrides:
            key, _, value = override.lstrip("+").partition("=")
            values.setdefault(key, {})[value] = None
    return {key: ", ".join(found) for key, found in values.items()}
