"""`pkg.module:function` in a config: a user's own loss, dataset or verifier, without touching the package."""

import importlib
import os
import sys
from collections.abc import Callable

from distill_cli.errors import ConfigError


def load_function(spec: str, *, key: str) -> Callable:
    """The function that `spec` names. The current folder counts as importable, as it does for `python -m`.

    Raises:
        ConfigError: `spec` has not the form `pkg.module:function`, or nothing callable is there.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}={spec}: must be a known name, or pkg.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a user's module raises what it likes
        raise ConfigError(f"{key}={spec}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}={spec}: {name} is no function")
    return found
