"""MLflow's client, and runs that are made once whoever asks for them.

A run is found again by its token, a tag: who was killed between making a run and writing down its id makes no second.
What several processes may do at once is done under a lock beside what they share: an SQLite database that starts eight
times at once would otherwise be migrated eight times at once.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

TOKEN = "distill.token"
MAX_VALUE = 6000
"""Characters of a parameter's value that MLflow keeps."""
MAX_TAG = 5000
PIECE = 100
"""Parameters or tags of one request, at most."""


def connect(uri: str) -> MlflowClient:
    """A client whose database is there. Takes seconds: imports, and migrations where the database is new."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it prints the address with its password
    from mlflow import MlflowClient

    with _database_lock(uri):
        client = MlflowClient(tracking_uri=uri)
        if uri.startswith("sqlite:"):
            client.search_experiments(max_results=1)  # makes the tables
        return client


def _database_lock(uri: str):
    file = sqlite_file(uri)
    if file is None:
        return nullcontext()
    file.parent.mkdir(parents=True, exist_ok=True)
    return locked(file.with_name(f".{file.name}.lock"))


def sqlite_file(uri: str) -> Path | None:
    """The database of a `sqlite:///path`; None where it is something else."""
    found = re.fullmatch(r"sqlite:///([^?]+).*", uri)
    return Path(found[1]) if found else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; free again when the process ends, however that happens."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, name: str, *, artifacts: Path) -> str:
    """The experiment, made if it is not there.

    Args:
        artifacts: where its artifacts go if no server decides that.
    """
    from mlflow.exceptions import MlflowException

    uri = client.tracking_uri
    location = None if re.match("https?:|databricks", uri) else artifacts.absolute().as_uri()
    for _ in range(2):
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run made it a moment ago
                raise
    raise RuntimeError(f"experiment {name}: neither there nor to be made")


@dataclass(frozen=True)
class Made:
    run_id: str
    is_new: bool


def make_run(client: MlflowClient, experiment: str, *, name: str, token: str, parent: str | None) -> Made:
    """The run with this token, made if it is not there."""
    found = client.search_runs([experiment], filter_string=f"tags.`{TOKEN}` = '{token}'", max_results=1)
    if found:
        return Made(found[0].info.run_id, is_new=False)
    tags = {TOKEN: token, **({"mlflow.parentRunId": parent} if parent else {})}
    return Made(client.create_run(experiment, run_name=name, tags=tags).info.run_id, is_new=True)


def describe(client: MlflowClient, run_id: str, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """Parameters that are not there yet, which MLflow never changes, and tags, the newest of which count."""
    from mlflow.entities import Param, RunTag

    there = client.get_run(run_id).data.params
    new = [Param(key, str(value)[:MAX_VALUE]) for key, value in params.items() if key not in there]
    for begin in range(0, len(new), PIECE):
        client.log_batch(run_id, params=new[begin : begin + PIECE])
    client.log_batch(run_id, tags=[RunTag(key, str(value)[:MAX_TAG]) for key, value in tags.items()])
