"""Sources and verifiers by name: a file in data/sources or data/verifiers, or `pkg.module:function`.

A source is a function `load(**keys)` that returns a sequence of examples or a `Stream` of them; its keyword arguments
are the keys that `data.train` takes beside `source`, so a key that it does not know, or of another type, is refused
here. A verifier is a function `verify(response, answer) -> float`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill_cli.config.choices import nearest
from distill_cli.data.environments import Environment
from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError
from distill_cli.types import Example
from distill_cli.user_code import load_function

Verifier = Callable[[str, str], float]


def load_examples(spec: dict[str, Any], *, key: str, context: str | None = None) -> Sequence[Example] | Stream:
    """The rows of the source that `spec` describes.

    Args:
        spec: `source` and that source's own keys.
        key: where in the config it stands, for messages.
        context: the column that only the teacher sees (`data.teacher_context`).

    Raises:
        ConfigError: no such source, keys it does not take, or data that is not what it should be.
    """
    load = resolve_source(spec, key=key)
    keys = {name: value for name, value in spec.items() if name != "source"}
    if context is not None:
        if "context_key" not in inspect.signature(load).parameters:
            raise ConfigError(f"data.teacher_context={context}: the source {spec['source']} has no context_key to read")
        keys["context_key"] = context
    problems = _key_problems(load, keys, key=key, source=str(spec["source"]))
    if problems:
        raise ConfigError(*problems)
    try:
        examples = load(**keys)
    except ConfigError as error:
        raise ConfigError(*(_located(problem, keys, key) for problem in error.problems)) from error
    except Exception as error:  # a source may be a user's own
        raise ConfigError(f"{key}.source={spec['source']}: {type(error).__name__}: {error}") from error
    if not isinstance(examples, Stream) and len(examples) == 0:
        raise ConfigError(f"{key}: the source {spec['source']} has no rows")
    return examples


def resolve_source(spec: dict[str, Any], *, key: str) -> Callable[..., Sequence[Example] | Stream]:
    name = spec.get("source")
    if not name:
        raise ConfigError(
            f"{key}.source: a value is needed; one of {', '.join(names('sources'))}, or pkg.module:function"
        )
    return _resolve(str(name), "sources", "load", key=f"{key}.source")


def _located(problem: str, keys: dict[str, Any], key: str) -> str:
    """A problem that begins with a source's own key, with where that key stands."""
    name = problem.split("=")[0].split(":")[0].split(".")[0]
    return f"{key}.{problem}" if name in keys or name in ("repeat", "limit", "split", "weights") else problem


def resolve_verifier(name: str) -> Verifier:
    """Raises ConfigError where there is none, or where it does not take a response and an answer."""
    verify = _resolve(name, "verifiers", "verify", key="data.verifier")
    with contextlib.suppress(ValueError):  # written in C: it does not say what it takes
        try:
            inspect.signature(verify).bind("response", "answer")
        except TypeError as error:
            raise ConfigError(f"data.verifier={name}: must take a response and an answer ({error})") from error
    return verify


def resolve_environment(name: str) -> Callable[[], Environment]:
    """What makes one sequence's environment."""
    return _resolve(name, "environments", "make", key="rollout.environment")


def resolve_extract(verify: Verifier) -> Callable[[str], str | None] | None:
    """What takes the final answer out of a response, so that answers can be counted: `extract` beside `verify`.

    Two answers that are the same give the same text; None is no answer. None where the verifier's module has no such
    function.
    """
    return getattr(inspect.getmodule(verify), "extract", None)


def names(kind: str) -> list[str]:
    """The files of data/sources, data/verifiers or data/environments."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / kind)]))


def _resolve(name: str, kind: str, function: str, *, key: str) -> Callable:
    if ":" in name:
        return load_function(name, key=key)
    known = names(kind)
    if name not in known:
        raise ConfigError(
            f"{key}={name}: no such name{nearest(name, known)} (there are: {', '.join(known)}; or pkg.module:function)"
        )
    return getattr(importlib.import_module(f"distill_cli.data.{kind}.{name}"), function)


def _key_problems(load: Callable, keys: dict[str, Any], *, key: str, source: str) -> list[str]:
    parameters = inspect.signature(load).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    hints = typing.get_type_hints(load)
    problems = []
    for name, value in keys.items():
        if name not in parameters:
            problems.append(f"{key}.{name}: unknown key{nearest(name, parameters)} (known: {', '.join(parameters)})")
        elif name in hints and not _fits(value, hints[name]):
            problems.append(f"{key}.{name}={value!r}: must be {_type_name(hints[name])}")
    for name, parameter in parameters.items():
        if name not in keys and parameter.default is parameter.empty:
            problems.append(f"{key}.{name}: a value is needed")
    strangers = [name for name in keys if name not in parameters and not nearest(name, parameters)]
    if strangers and source in names("sources"):
        fix = f"choose data={source}, which begins with that source's own"
        problems.append(f"{key}.source={source}: keys of another source are still there; {fix}")
    return problems


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, part) for part in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _type_name(hint: Any) -> str:
    return str(hint) if isinstance(hint, types.UnionType) else getattr(hint, "__name__", str(hint))
