"""Passwords and tokens, which have no place in what is written down: a run's folder, MLflow, logs.

A config that holds one is refused. Credentials in the tracking server's address are left in the environment: whoever is
started from here inherits MLFLOW_TRACKING_URI, as MLflow itself would read it, a cluster's job too.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from distill_cli.config.schema import Config

VARIABLE = "MLFLOW_TRACKING_URI"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/]*@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|token|secret|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
SECRET_KEY = re.compile(r"(^|[_.-])(token|password|passwd|secret|api_?key|access_?key|credentials?)$", re.I)
"""Keys that hold one, such as HF_TOKEN."""
SECRET_VALUE = re.compile(r"//[^/@\s]*:[^/@\s]+@|\b(hf_|ghp_|sk-|glpat-)\w{16,}")
"""Addresses with a password, and tokens that can be told by how they begin."""

IN_ENVIRONMENT = {"tracker.mlflow.uri"}
"""Left in the environment by `hide_credentials`."""


def without_credentials(text: str) -> str:
    """The text with `user:password@` and secret parameters taken out of every address in it."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1", text))


def hide_credentials(config: Config) -> Config:
    """Leaves the tracking server's address in the config without credentials, and whole in the environment."""
    uri = config.tracker.mlflow.uri
    if uri and without_credentials(uri) != uri:
        os.environ[VARIABLE] = uri
        mlflow = dataclasses.replace(config.tracker.mlflow, uri=without_credentials(uri))
        return dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, mlflow=mlflow))
    return config


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


def is_secret(key: str, value: str) -> bool:
    return bool(value and (SECRET_KEY.search(key) or SECRET_VALUE.search(value)))


def secret_problems(node: Any, at: str = "") -> Iterator[str]:
    """One line for each secret in a config's plain values, without the secret."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from secret_problems(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from secret_problems(value, at)
    elif isinstance(node, str) and at not in IN_ENVIRONMENT and is_secret(at, node):
        yield (
            f"{at}: holds a password or token, which would be written to the run's folder and to MLflow; leave it out "
            "and set it in the environment that you start from, which the ranks inherit (such as HF_TOKEN)"
        )
