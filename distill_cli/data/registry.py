"""Sources and verifiers by name: a file in data/sources or data/verifiers, or `pkg.module:function`.

A source is a function `load(**keys)` that returns a sequence of examples or a `Stream` of them. Its keyword arguments
are the keys that `data.train` takes in addition to `source`: others, and values of another type, are refused here. A
verifier is a function `verify(response, answer) -> float`.
"""

import contextlib
import importlib
import inspect
import operator
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill_cli.config.choices import nearest
from distill_cli.data.environments import Environment
from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError, refuse
from distill_cli.types import Example
from distill_cli.user_code import load_function

Verifier = Callable[[str, str], float]


def load_examples(
    spec: dict[str, Any], *, key: str, context: str | None = None, teacher: str | None = None
) -> Sequence[Example] | Stream:
    """Return the rows of the source that `spec` describes.

    Args:
        spec: `source` and that source's own keys.
        key: the config key of `spec`, for messages.
        context: the column that only the teacher reads (`data.teacher_context`).
        teacher: the column that names a row's teachers (`data.teacher_key`).

    Raises:
        ConfigError: no such source, keys it does not take, or data it cannot read.
    """
    name = str(spec.get("source") or "")
    if not name:
        choices = ", ".join(names("sources"))
        raise ConfigError(f"{key}.source: a value is needed; one of {choices}, or pkg.module:function")
    load = _resolve(name, "sources", "load", key=f"{key}.source")
    keys = {name: value for name, value in spec.items() if name != "source"}
    for parameter, column, at in (("context_key", context, "context"), ("teacher_key", teacher, "key")):
        if column is not None:
            if parameter not in inspect.signature(load).parameters:
                raise ConfigError(f"data.teacher_{at}={column}: the source {name} has no {parameter}")
            keys[parameter] = column
    refuse(_key_problems(load, keys, key=key, source=name))
    try:
        examples = load(**keys)
    except ConfigError as error:
        parameters = {*keys, "repeat", "limit", "split", "weights"}
        located = [f"{key}." if re.split("[=:.]", one)[0] in parameters else "" for one in error.problems]
        raise ConfigError(*map(operator.add, located, error.problems)) from error
    except Exception as error:  # a source may be the user's code
        raise ConfigError(f"{key}.source={name}: {type(error).__name__}: {error}") from error
    if not isinstance(examples, Stream) and len(examples) == 0:
        raise ConfigError(f"{key}: the source {name} has no rows")
    return examples


def resolve_verifier(name: str) -> Verifier:
    """Return the verifier. Raises ConfigError if there is none, or it does not take a response and an answer."""
    verify = _resolve(name, "verifiers", "verify", key="data.verifier")
    with contextlib.suppress(ValueError):  # written in C: it has no signature
        try:
            inspect.signature(verify).bind("response", "answer")
        except TypeError as error:
            raise ConfigError(f"data.verifier={name}: must take a response and an answer ({error})") from error
    return verify


def resolve_environment(name: str) -> Callable[[], Environment]:
    """Return the function that makes one sequence's environment. Raises ConfigError if there is none."""
    return _resolve(name, "environments", "make", key="rollout.environment")


def resolve_extract(verify: Verifier) -> Callable[[str], str | None] | None:
    """Return `extract` of the verifier's module, which takes the final answer out of a response; None without one.

    Equal answers give the same text, so that they can be counted; no answer gives None.
    """
    return getattr(inspect.getmodule(verify), "extract", None)


def names(kind: str) -> list[str]:
    """Return the files of data/sources, data/verifiers or data/environments."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / kind)]))


def _resolve(name: str, kind: str, function: str, *, key: str) -> Callable[..., Any]:
    if ":" in name:
        return load_function(name, key=key)
    if name not in (known := names(kind)):
        there = f"there are: {', '.join(known)}; or pkg.module:function"
        raise ConfigError(f"{key}={name}: no such name{nearest(name, known)} ({there})")
    return getattr(importlib.import_module(f"distill_cli.data.{kind}.{name}"), function)


def _key_problems(load: Callable[..., Any], keys: dict[str, Any], *, key: str, source: str) -> list[str]:
    parameters = inspect.signature(load).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    hints, problems = typing.get_type_hints(load), []
    for name, value in keys.items():
        if name not in parameters:
            problems.append(f"{key}.{name}: unknown key{nearest(name, parameters)} (known: {', '.join(parameters)})")
        elif not _fits(value, hint := hints.get(name, Any)):
            type_name = str(hint) if isinstance(hint, types.UnionType) else getattr(hint, "__name__", str(hint))
            problems.append(f"{key}.{name}={value!r}: must be {type_name}")
    for name, parameter in parameters.items():
        if name not in keys and parameter.default is parameter.empty:
            problems.append(f"{key}.{name}: a value is needed")
    if source in names("sources") and any(name not in parameters and not nearest(name, parameters) for name in keys):
        fix = f"choose data={source}, which begins with the keys of that source"
        problems.append(f"{key}.source={source}: keys of another source are still there; {fix}")
    return problems


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if isinstance(value, bool) and kind in (int, float):
        return False
    return isinstance(value, (int, float) if kind is float else kind)
