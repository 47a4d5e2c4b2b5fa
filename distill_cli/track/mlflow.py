"""MLflow: a SQLite file in run.root, or a server. A sweep is a parent run of its runs.

A run is found again by its token, a tag: if a process is killed between making a run and recording its id, the next
one does not make a second run. Processes take a lock next to what they share: eight runs that start together would
otherwise migrate a new SQLite database eight times at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distill_cli.config.credentials import without_credentials
from distill_cli.config.execution_schema import MlflowConfig
from distill_cli.config.schema import Config
from distill_cli.folders.lock import hold
from distill_cli.folders.run_dir import RunDir, SweepDir, read_json
from distill_cli.machine.findings import Finding, find_package, unreachable
from distill_cli.report.read import read_config
from distill_cli.track.base import Tracker
from distill_cli.track.facts import data_profile, models, run_tags
from distill_cli.track.shipper import State

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

log = logging.getLogger(__name__)

VARIABLE = "MLFLOW_TRACKING_URI"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""Settings of the client, unless the user has set them."""
TOKEN = "distill.token"
MAX_VALUE, MAX_TAG = 6000, 5000
"""Maximal characters of a parameter and of a tag."""
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
TAGS = {"user": "mlflow.user", "git.commit": "mlflow.source.git.commit", "git.dirty": "mlflow.source.git.dirty"}
"""Tags that MLflow's pages show by names of its own."""


class MlflowTracker(Tracker):
    name = "mlflow"
    label = "MLflow"

    def __init__(self, settings: MlflowConfig, config: Config, run: RunDir) -> None:
        self._settings, self._config, self._run = settings, config, run
        self._root = Path(config.run.root).absolute()
        self._sweep = SweepDir(run.path.parent) if SweepDir(run.path.parent).file.is_file() else None
        self._uri = whole_uri(settings.uri) or f"sqlite:///{self._root / 'mlflow.db'}"
        self.place = without_credentials(self._uri)
        self.page = f"mlflow ui --backend-store-uri {self.place}" if self._uri.startswith("sqlite:") else self.place
        self.logs_model = settings.log_model
        self._run_id = ""

    def identity(self, known: Mapping[str, Any]) -> dict[str, Any]:
        place = {"uri": self.place, "experiment": self._settings.experiment}
        run_id = known.get("run_id") if place.items() <= known.items() else None
        return {**place, "token": known.get("token") or uuid.uuid4().hex, "run_id": run_id}

    def open(self, identity: dict[str, Any], *, running: bool) -> None:
        client, parent = self.client, {}
        if self._sweep and (running or identity["run_id"] is None):
            parent["mlflow.parentRunId"] = open_parent(self, self._sweep, running=running)
        if identity["run_id"] is None:
            name = self._settings.run_name or self._run.path.name
            identity["run_id"] = self.make_run(name, token=identity["token"], tags=parent)
        if running:
            client.update_run(identity["run_id"], status="RUNNING")
        if self._run_id != identity["run_id"]:
            stored = client.get_run(identity["run_id"])
            describe(client, stored, params=read_config(self._run), tags=mlflow_tags(run_tags(self._config, self._run)))
            log_inputs(client, stored, self._config)
            self._run_id = identity["run_id"]

    @cached_property
    def client(self) -> MlflowClient:
        """Connect; make the database and the experiment if they do not exist. Takes seconds: imports, migrations."""
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it prints the address with its password
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        database = re.fullmatch(r"sqlite:///([^?]+).*", self._uri)
        lock = Path(database[1] if database else self._root / "mlflow")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with hold(lock.with_name(f".{lock.name}.lock"), wait_s=inf):
            client, name = MlflowClient(tracking_uri=self._uri), self._settings.experiment
            is_server = re.match("https?:|databricks", self._uri)
            artifacts = None if is_server else (self._root / "mlartifacts").as_uri()
            found = client.get_experiment_by_name(name)
            made = found.experiment_id if found else client.create_experiment(name, artifact_location=artifacts)
        self._experiment_id = made
        return client

    def make_run(self, name: str, *, token: str, tags: Mapping[str, str]) -> str:
        """Return the id of the run with this token; make the run if it does not exist."""
        client, at = self.client, self._experiment_id
        found = client.search_runs([at], filter_string=f"tags.`{TOKEN}` = '{token}'", max_results=1)
        run = found[0] if found else client.create_run(at, run_name=name, tags={TOKEN: token, **tags})
        return run.info.run_id

    def logged(self) -> set[tuple[str, int]]:
        keys = self.client.get_run(self._run_id).data.metrics
        return {(key, metric.step) for key in keys for metric in self.client.get_metric_history(self._run_id, key)}

    def log(self, rows: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, int(row["time"] * 1000), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if key not in ("step", "time")
        ]
        self.client.log_batch(self._run_id, metrics=metrics)

    def artifact(self, file: Path, name: str) -> None:
        folder = Path(name).parent.as_posix()
        self.client.log_artifact(self._run_id, str(file), None if folder == "." else folder)

    def close(self, status: str) -> None:
        self.client.set_terminated(self._run_id, status=STATUS.get(status, "FAILED"))
        if self._sweep:
            close_parent(self, self._sweep)

    @classmethod
    def problems(cls, settings: MlflowConfig) -> Iterator[str]:
        if settings.uri is not None and (problem := uri_problem(settings.uri)):
            yield f"uri: {problem}"
        if not settings.experiment.strip():
            yield "experiment: must not be empty"

    @classmethod
    def doctor(cls) -> list[Finding]:
        found = [find_package("mlflow", "mlflow", fix="install it, or run with tracker=none")]
        if found[0].ok and (uri := os.environ.get(VARIABLE)):
            problem = uri_problem(uri)
            reason = problem or (unreachable(f"{uri.rstrip('/')}/health") if uri.startswith("http") else None)
            fix = "correct or unset it" if problem else "runs go on without it; distill track sync RUN sends the rest"
            detail = f"{VARIABLE}: {problem}" if problem else f"{without_credentials(uri)} {reason or 'is used'}"
            found.append(Finding("mlflow server", reason is None, detail, fix, needed=problem is not None))
        return found


TRACKER = MlflowTracker


def mlflow_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a run's tags by MLflow's names, with those that say where it comes from."""
    from mlflow.version import VERSION

    is_job = any(name.startswith("slurm.") for name in tags)
    source = {"mlflow.source.name": "distill", "mlflow.source.type": "JOB" if is_job else "LOCAL"}
    return source | {"versions.mlflow": VERSION} | {TAGS.get(name, name): value for name, value in tags.items()}


def whole_uri(uri: str | None) -> str | None:
    """Return a recorded address with the credentials that the environment has for it; the environment's for None."""
    inherited = os.environ.get(VARIABLE) or None
    return inherited if uri is None or (inherited and without_credentials(inherited) == uri) else uri


def uri_problem(uri: str) -> str | None:
    """Return what is wrong with an address, without quoting it: it may hold a password."""
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme not in SCHEMES or (scheme != "databricks" and "://" not in uri):
        return "must be an address such as http://host:5000 or sqlite:///runs/mlflow.db (MLflow takes no folders)"
    try:
        urlsplit(uri).port  # noqa: B018
    except ValueError:
        return "its port is not a number; write a `/`, `@`, `:`, `#` or `?` in a password as %2F, %40, %3A, %23 or %3F"
    return None


def describe(client: MlflowClient, run: Run, *, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
    """Log the new parameters, since MLflow never changes one, and all tags, which replace the old ones."""
    from mlflow.entities import Param, RunTag

    new = [Param(key, str(value)[:MAX_VALUE]) for key, value in params.items() if key not in run.data.params]
    newest = [RunTag(key, str(value)[:MAX_TAG]) for key, value in tags.items()]
    client.log_batch(run.info.run_id, params=new, tags=newest)


def log_inputs(client: MlflowClient, run: Run, config: Config) -> None:
    """Log data and models as the run's inputs, which MLflow's pages list and search by, unless it has them.

    A model is an entry of the experiment, by its path, that the runs share. Servers before MLflow 3 lack such entries:
    there the tags `model.student` and `model.teacher` name the models.
    """
    from mlflow.entities import LoggedModelInput
    from mlflow.exceptions import MlflowException

    there, data = run.inputs, {"training": config.data.train, "validation": config.data.validation}
    if not (there and there.dataset_inputs):
        client.log_inputs(run.info.run_id, datasets=[_dataset(context, spec) for context, spec in data.items() if spec])
    if there and there.model_inputs:
        return
    try:
        ids = [_model(client, run.info.experiment_id, role, path) for role, path in models(config).items()]
        client.log_inputs(run.info.run_id, models=[LoggedModelInput(model_id) for model_id in ids])
    except MlflowException as error:
        if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"):
            raise
        log.warning("this MLflow server (older than 3) has no model inputs; the tags model.* name the models")


def _dataset(context: str, spec: Mapping[str, Any]) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest, profile = data_profile(spec, key="data.train" if context == "training" else "data.validation")
    kind, source = str(spec.get("source")), json.dumps(dict(spec), default=str)
    name = Path(str(spec.get("path") or kind)).name[:500]
    dataset = Dataset(name=name, digest=digest, source_type=kind, source=source, profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _model(client: MlflowClient, experiment: str, role: str, path: str) -> str:
    name = re.sub(r"[/:.%\"']", "_", path)[-200:]
    found = client.search_logged_models([experiment], filter_string=f"name = '{name}'")
    if known := [model for model in found if model.tags.get("path") == path]:
        return min(known, key=lambda model: model.creation_timestamp).model_id
    tags = {"path": path, "mlflow.model.isExternal": "true"}
    made = client.create_logged_model(experiment, name=name, tags=tags, model_type=role)
    client.finalize_logged_model(made.model_id, "READY")
    return made.model_id


def open_parent(tracker: MlflowTracker, sweep: SweepDir, *, running: bool) -> str:
    """Return the id of the sweep's run; make it if it does not exist, mark it as running if one of its runs is."""
    with _locked_state(tracker, sweep) as state:
        if state.identity["run_id"] is None:
            state.save()
            made = tracker.make_run(sweep.path.name, token=state.identity["token"], tags={})
            tags = {"distill.sweep_dir": sweep.path, "distill.runs": len(sweep.elements())}
            describe(tracker.client, tracker.client.get_run(made), params=grid(sweep), tags=tags)
            tracker.client.log_artifact(made, str(sweep.file))
            state.identity["run_id"] = made
        elif running and state.end is not None:
            tracker.client.update_run(state.identity["run_id"], status="RUNNING")
            state.end = None
        state.save()
        return state.identity["run_id"]


def close_parent(tracker: MlflowTracker, sweep: SweepDir) -> None:
    """Mark the sweep's run as ended if all its runs have ended."""
    with _locked_state(tracker, sweep) as state:
        files = [sweep.path / element.folder / state.file.name for element in sweep.elements()]
        ends = {read_json(file)["end"] if file.exists() else None for file in files}
        if state.identity["run_id"] is not None and None not in ends:
            state.end = "finished" if ends == {"finished"} else "stopped" if "failed" not in ends else "failed"
            tracker.client.set_terminated(state.identity["run_id"], status=STATUS[state.end])
            state.save()


@contextmanager
def _locked_state(tracker: MlflowTracker, sweep: SweepDir) -> Iterator[State]:
    with hold(sweep.path / ".mlflow.lock", wait_s=inf):
        yield State.of(RunDir(sweep.path), tracker)


def grid(sweep: SweepDir) -> dict[str, str]:
    """Return each swept key with its values in order, or with the range of a search."""
    pairs = [override.lstrip("+").split("=", 1) for element in sweep.elements() for override in element.overrides]
    keys = dict.fromkeys(key for key, _ in pairs)
    return sweep.space() or {key: ", ".join(dict.fromkeys(value for k, value in pairs if k == key)) for key in keys}
