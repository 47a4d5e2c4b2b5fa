"""Credentials in the tracking server's address stay in the environment: nothing that is written down has them.

Whoever is started from here inherits MLFLOW_TRACKING_URI, as MLflow itself would read it: a job of Slurm's too.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from distill_cli.config.schema import Config

VARIABLE = "MLFLOW_TRACKING_URI"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/]*@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|token|secret|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """The text with `user:password@` and secret parameters taken out of every address in it."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1", text))


def hide_credentials(config: Config) -> None:
    """Leaves the tracking server's address in the config without credentials, and whole in the environment."""
    uri = config.tracker.mlflow.uri
    if uri and without_credentials(uri) != uri:
        os.environ[VARIABLE] = uri
        config.tracker.mlflow.uri = without_credentials(uri)


def whole_uri(uri: str | None) -> str | None:
    """An address that was written down, with the credentials that the environment has for it.

    None where there is none in either.
    """
    inherited = os.environ.get(VARIABLE) or None
    if uri is None or (inherited and without_credentials(inherited) == uri):
        return inherited
    return uri


def uri_problem(uri: str) -> str | None:
    """What is wrong with a tracking server's address, without quoting it: it may hold a password."""
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme not in SCHEMES or (scheme != "databricks" and "://" not in uri):
        return "must be an address such as http://host:5000 or sqlite:///runs/mlflow.db (MLflow takes no folders)"
    try:
        urlsplit(uri).port  # noqa: B018
    except ValueError:
        return "its port is no number; write a `/`, `@`, `:`, `#` or `?` in a password as %2F, %40, %3A, %23 or %3F"
    return None
