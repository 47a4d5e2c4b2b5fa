"""Functions of the loss whose keyword parameters are keys of the `loss` section. No torch.

A family of them (`divergence.py`, `token_weight.py`) has a key that names one of its functions, or a user's
`pkg.module:function`. A function's positional parameters are what it is called with; types, defaults and ranges of its
keyword parameters are read from its signature before a run starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.user_code import load_function

Function = Callable[..., Any]


@dataclass(frozen=True)
class Range:
    """Values that a parameter may have: from `low` to `high`, both included, except `excluded`."""

    low: float
    high: float
    excluded: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.excluded

    def __str__(self) -> str:
        without = " and ".join(f"{value:g}" for value in self.excluded)
        return f"{self.low:g}..{self.high:g}" + (f", {without} excluded" if without else "")


class Signatures:
    """The functions of a family by name, and the parameters that they take."""

    def __init__(self, key: str, functions: Mapping[str, Function], *, takes: tuple[str, ...], is_choice: bool) -> None:
        """
        Args:
            key: the config's, whose value names a function.
            takes: what a function is called with. If `is_choice`, its positional parameters are any of these names;
                else it has as many of them, with names of its own.
        """
        self.key, self.functions, self.takes, self.is_choice = key, functions, takes, is_choice
        self.parameters: dict[str, type] = {
            name: getattr(parameter.annotation, "__origin__", parameter.annotation)
            for function in functions
            for name, parameter in self.parameters_of(function).items()
        }
        """The parameters of all functions with their types: each is a key of the `loss` section."""

    def find(self, name: str) -> Function:
        """Return the function with a name, or a user's `pkg.module:function`. Raises ConfigError: there is none."""
        if name not in self.functions and ":" not in name:
            raise ConfigError(f"{self.key}={name}: must be one of {', '.join(self.functions)}, or pkg.module:function")
        return self.functions.get(name) or load_function(name, key=self.key)

    def positional_of(self, name: str) -> tuple[str, ...]:
        """Return the names of a function's positional parameters. Raises ConfigError as `parameters_of`."""
        return self._split(name)[0]

    def parameters_of(self, name: str) -> dict[str, inspect.Parameter]:
        """Return a function's keyword parameters.

        Raises:
            ConfigError: there is no such function, or it is not called as it would be.
        """
        return self._split(name)[1]

    def _split(self, name: str) -> tuple[tuple[str, ...], dict[str, inspect.Parameter]]:
        function, number = self.find(name), len(self.takes)
        try:
            parameters = dict(_signature(function).parameters)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.key}={name}: its parameters cannot be read: {error}") from error
        known = [one for one in parameters if one in self.takes] if self.is_choice else list(parameters)[:number]
        others = {one: parameter for one, parameter in parameters.items() if one not in known}
        if not known or (not self.is_choice and len(known) < number):
            must = f"any of ({', '.join(self.takes)})" if self.is_choice else f"({', '.join(self.takes)})"
            raise ConfigError(f"{self.key}={name}: must take {must}")
        return tuple(known), others

    def taken(self, name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `loss.kwargs` that a user's function takes. Raises ConfigError as `parameters_of`."""
        if name in self.functions:
            return {}
        known = self.parameters_of(name)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        return {one: value for one, value in kwargs.items() if takes_any or one in known}

    def resolve(self, name: str, **options: Any) -> Function:
        """Return the function that a name stands for, with its parameters bound.

        Args:
            options: keyword arguments. Those of other functions of the family (`parameters`) are ignored.

        Raises:
            ConfigError: no such function, or parameters that it does not take or lacks.
        """
        function, taken = self.find(name), self.parameters_of(name)
        own = {one: value for one, value in options.items() if one in taken or one not in self.parameters}
        try:
            inspect.signature(function).bind(*self.positional_of(name), **own)
        except TypeError as error:
            raise ConfigError(f"{self.key}={name}: {error}") from error
        return partial(function, **own)

    def problems(self, name: str, parameters: Mapping[str, Any], *, kwargs: Mapping[str, Any]) -> Iterator[str]:
        """Yield one line for each parameter that a function does not take, lacks, or has out of range.

        Args:
            parameters: the values of `loss.<name>`, for names in `parameters`.
            kwargs: the values of `loss.kwargs.<name>`, for all other names.
        """
        try:
            taken = self.parameters_of(name)
        except ConfigError as error:
            yield from error.problems
            return
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        for one in kwargs:
            if one in self.parameters:
                yield f"loss.kwargs.{one}: set loss.{one} instead"
            elif one not in taken and not takes_any:
                yield f"loss.kwargs.{one}: {self.key}={name} has {', '.join(taken) or 'no parameters'}; leave it out"
        for one, parameter in taken.items():
            key = f"loss.{one}" if one in self.parameters else f"loss.kwargs.{one}"
            value = {**kwargs, **parameters}.get(one, parameter.default)
            if value is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                yield f"{key}: a value is needed, with {self.key}={name}"
            for allowed in getattr(parameter.annotation, "__metadata__", ()):
                if isinstance(allowed, Range) and value is not parameter.empty and value not in allowed:
                    yield f"{key}={value}: must lie in {allowed}, with {self.key}={name}"


def _signature(function: Function) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError):  # a user's annotations may name what only a type checker imports
        return inspect.signature(function)
