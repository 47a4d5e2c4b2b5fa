"""Passwords and tokens, which must not reach a run's folder, trackers or logs.

A config that holds one is refused, except in addresses of servers, the keys that the schema marks `credentials`. Those
stay whole in memory, are written without their credentials, and reach the started processes through the environment.
"""

import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from distill_cli.config.fields import declared_keys
from distill_cli.config.schema import Config

_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/]*@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|token|secret|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
SECRET_KEY = re.compile(r"(^|[_.-])(token|password|passwd|secret|api_?key|access_?key|credentials?)$", re.I)
"""Keys that hold a secret, such as HF_TOKEN."""
SECRET_VALUE = re.compile(r"//[^/@\s]*:[^/@\s]+@|\b(hf_|ghp_|sk-|glpat-)\w{16,}")
"""Addresses with a password, and tokens with a known prefix."""


def without_credentials(text: str) -> str:
    """Return the text without `user:password@` and secret parameters in every address in it."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1", text))


def credential_keys() -> dict[str, str]:
    """Return the keys of addresses that may hold credentials, each with the environment variable that carries it."""
    return {key: data["credentials"] for key, data in declared_keys(Config).items() if "credentials" in data}


def credentials_environment(config: Config) -> dict[str, str]:
    """Return the environment variables that carry what config.yaml leaves out."""
    addresses = {variable: attrgetter(key)(config) for key, variable in credential_keys().items()}
    return {name: uri for name, uri in addresses.items() if uri and without_credentials(uri) != uri}


def secret_problems(node: Any, at: str = "") -> Iterator[str]:
    """Yield one line for each secret in a config's plain values, without the secret."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from secret_problems(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from secret_problems(value, at)
    elif at in credential_keys():
        return
    elif isinstance(node, str) and node and (SECRET_KEY.search(at) or SECRET_VALUE.search(node)):
        fix = "leave it out and set it in your environment, which the ranks inherit (such as HF_TOKEN)"
        yield f"{at}: holds a password or token, which the run's folder and trackers would keep; {fix}"
