"""A run's data and models as MLflow's inputs, which its pages list and search by."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSource:
    """A data source as the config names it."""

    context: str
    """`training` or `validation`."""
    spec: Mapping[str, Any]
    """`source` and its own keys."""
    load: Callable[[], Sequence[Any]]
    """Its rows: for their number and their digest. May raise where the data is no longer there."""

    def profile(self) -> tuple[str, dict[str, int]]:
        """A digest of the rows, or where they cannot be read of what the config says, and their number."""
        try:
            rows = self.load()
            if not hasattr(rows, "__len__"):  # a stream: reading it to its end may take for ever
                return _digest([dict(self.spec)]), {}
        except Exception as error:
            log.info("%s data cannot be read for its digest: %s", self.context, error)
            return _digest([dict(self.spec)]), {}
        return _digest(rows), {"num_rows": len(rows)}


def log_inputs(
    client: MlflowClient, run_id: str, *, datasets: Sequence[DatasetSource], models: Mapping[str, str]
) -> None:
    """Logs both kinds; done again it changes nothing.

    A model is an entry of the experiment that its runs share, by its path. Servers before MLflow 3 know no such
    entries: there the tags `model.student` and `model.teacher` say it alone.
    """
    from mlflow.entities import LoggedModelInput
    from mlflow.exceptions import MlflowException

    if datasets:
        client.log_inputs(run_id, datasets=[_dataset(source) for source in datasets])
    if not models:
        return
    experiment = client.get_run(run_id).info.experiment_id
    try:
        ids = [_model(client, experiment, role, path) for role, path in models.items()]
        client.log_inputs(run_id, models=[LoggedModelInput(model_id) for model_id in ids])
    except MlflowException as error:
        if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"):
            raise
        log.warning("this MLflow server keeps no model inputs (it is older than 3); the tags model.* name them")


def _dataset(source: DatasetSource):
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest, profile = source.profile()
    name = str(source.spec.get("path") or source.spec.get("source"))
    dataset = Dataset(
        name=Path(name).name[:500],
        digest=digest,
        source_type=str(source.spec.get("source")),
        source=json.dumps(dict(source.spec), default=str),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", source.context)])


def _model(client: MlflowClient, experiment: str, role: str, path: str) -> str:
    name = re.sub(r"[/:.%\"']", "_", path)[-200:]
    found = client.search_logged_models([experiment], filter_string=f"name = '{name}'")
    known = [model for model in found if model.tags.get("path") == path]
    if known:
        return min(known, key=lambda model: model.creation_timestamp).model_id
    tags = {"path": path, "mlflow.model.isExternal": "true"}
    made = client.create_logged_model(experiment, name=name, tags=tags, model_type=role)
    client.finalize_logged_model(made.model_id, "READY")
    return made.model_id


def _digest(rows: Sequence[Any]) -> str:
    """36 characters, as many as MLflow keeps."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:36]
