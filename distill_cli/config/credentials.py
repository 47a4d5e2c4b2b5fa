"""Passwords and tokens, which have no place in what is written down: a run's folder, trackers, logs.

A config that holds one is refused. Exceptions are addresses of servers, the keys that the schema marks `credentials`:
they are whole in memory, are written without their credentials, and reach what is started through its environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

from distill_cli.config.schema import Config

_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/]*@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|token|secret|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
SECRET_KEY = re.compile(r"(^|[_.-])(token|password|passwd|secret|api_?key|access_?key|credentials?)$", re.I)
"""Keys that hold one, such as HF_TOKEN."""
SECRET_VALUE = re.compile(r"//[^/@\s]*:[^/@\s]+@|\b(hf_|ghp_|sk-|glpat-)\w{16,}")
"""Addresses with a password, and tokens that can be told by how they begin."""


def without_credentials(text: str) -> str:
    """The text with `user:password@` and secret parameters taken out of every address in it."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1", text))


def credential_keys(kind: type = Config, at: str = "") -> dict[str, str]:
    """Return the keys of addresses that may hold credentials, each with the environment variable that carries it."""
    found = {}
    for field in fields(kind):
        if field.metadata.get("credentials"):
            found[f"{at}{field.name}"] = field.metadata["credentials"]
        elif is_dataclass(field.default_factory):
            found |= credential_keys(field.default_factory, f"{at}{field.name}.")
    return found


def credentials_environment(config: Config) -> dict[str, str]:
    """Return the environment variables that carry what config.yaml leaves out."""
    addresses = {variable: attrgetter(key)(config) for key, variable in credential_keys().items()}
    return {name: uri for name, uri in addresses.items() if uri and without_credentials(uri) != uri}


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
    elif isinstance(node, str) and at not in credential_keys() and is_secret(at, node):
        yield (
            f"{at}: holds a password or token, which would be written to the run's folder and to trackers; leave it "
            "out and set it in the environment that you start from, which the ranks inherit (such as HF_TOKEN)"
        )
