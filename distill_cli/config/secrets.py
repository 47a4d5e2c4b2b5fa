"""Passwords and tokens, which have no place in a config: it is written to the run's folder, to MLflow and to logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECRET_KEY = re.compile(r"(^|[_.-])(token|password|passwd|secret|api_?key|access_?key|credentials?)$", re.I)
"""Keys that hold one, such as HF_TOKEN."""
SECRET_VALUE = re.compile(r"//[^/@\s]*:[^/@\s]+@|\b(hf_|ghp_|sk-|glpat-)\w{16,}")
"""Addresses with a password, and tokens that can be told by how they begin."""

ELSEWHERE = {"tracker.mlflow.uri"}
"""Kept in the environment alone, by who reads them."""


def secret_problems(node: Any, at: str = "") -> Iterator[str]:
    """One line for each secret in a config's plain values, without the secret."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from secret_problems(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from secret_problems(value, at)
    elif (
        isinstance(node, str) and node and at not in ELSEWHERE and (SECRET_KEY.search(at) or SECRET_VALUE.search(node))
    ):
        yield (
            f"{at}: holds a password or token, which would be written to the run's folder and to MLflow; leave it out "
            "and set it in the environment that you start from, which the ranks inherit (such as HF_TOKEN)"
        )
