"""Divergences between teacher and student, one elementwise function each. No torch at import time.

A divergence is a function of (log p, log q) of a class that returns the class's term of D(p || q), where p is the
teacher and q the student. Its keyword parameters are keys of the `loss` section: their types, defaults and ranges are
read from its signature before a run starts. The tail handles everything outside the teacher's top-k, in the same way
for all divergences (distill_loss.py).

To add one, write the function, put it in DIVERGENCES, and write conf/loss/<name>.yaml with its parameters; tests
enumerate both. It may use only methods of tensors.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from distill_cli.errors import ConfigError
from distill_cli.user_code import load_function

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # signatures are evaluated where torch is not imported

Divergence = Callable[[Tensor, Tensor], Tensor]


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


def forward(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q): mode-covering."""
    return logp.exp() * (logp - logq)


def reverse(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q || p): mode-seeking."""
    return forward(logq, logp)


def mixed(logp: Tensor, logq: Tensor, *, kl_weight: Annotated[float, Range(0, 1)] = 0.5) -> Tensor:
    """kl_weight KL(p || q) + (1 - kl_weight) KL(q || p)."""
    return kl_weight * forward(logp, logq) + (1 - kl_weight) * reverse(logp, logq)


def jsd(logp: Tensor, logq: Tensor, *, kl_weight: Annotated[float, Range(0, 1, excluded=(0, 1))] = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q (GKD, Agarwal et al. 2024).

    It is 0 everywhere at w = 0 and at w = 1.
    """
    logm = _log_mixture(logp, logq, weight=kl_weight)
    return kl_weight * forward(logp, logm) + (1 - kl_weight) * forward(logq, logm)


def skew_forward(logp: Tensor, logq: Tensor, *, skew: Annotated[float, Range(0, 1, excluded=(1,))] = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q) (DistiLLM, Ko et al. 2024, who found 0.1 best). It is 0 everywhere at skew = 1."""
    return forward(logp, _log_mixture(logp, logq, weight=skew))


def skew_reverse(logp: Tensor, logq: Tensor, *, skew: Annotated[float, Range(0, 1, excluded=(1,))] = 0.1) -> Tensor:
    """KL(q || (1 - skew) p + skew q) (DistiLLM, Ko et al. 2024, who found 0.1 best). It is 0 everywhere at skew = 1."""
    return forward(logq, _log_mixture(logq, logp, weight=skew))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (forward, reverse, mixed, jsd, skew_forward, skew_reverse)
}


def resolve_divergence(kl_type: str, **parameters: Any) -> Divergence:
    """Return the function of (log p, log q) that `kl_type` names, with its parameters bound.

    Args:
        parameters: its keyword arguments. Those of other divergences (PARAMETERS) are ignored.

    Raises:
        ConfigError: no such divergence, or parameters that it does not take or lacks.
    """
    function = find_divergence(kl_type)
    taken = parameters_of(kl_type)
    options = {name: value for name, value in parameters.items() if name in taken or name not in PARAMETERS}
    try:
        inspect.signature(function).bind(None, None, **options)
    except TypeError as error:
        raise ConfigError(f"loss.kl_type={kl_type}: {error}") from error
    return partial(function, **options)


def find_divergence(kl_type: str) -> Callable[..., Tensor]:
    """Return the function that `kl_type` names: one of DIVERGENCES, or a user's `pkg.module:function`.

    Raises:
        ConfigError: there is none.
    """
    if kl_type not in DIVERGENCES and ":" not in kl_type:
        choices = ", ".join(DIVERGENCES)
        raise ConfigError(f"loss.kl_type={kl_type}: must be one of {choices}, or pkg.module:function")
    return DIVERGENCES.get(kl_type) or load_function(kl_type, key="loss.kl_type")


def parameters_of(kl_type: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a divergence, without log p and log q.

    Raises:
        ConfigError: there is no such divergence, or it does not take log p and log q.
    """
    function = find_divergence(kl_type)
    try:
        parameters = _signature(function).parameters
        _logp, _logq, *others = parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss.kl_type={kl_type}: must take (logp, logq): {error}") from error
    return {name: parameters[name] for name in others}


def _signature(function: Callable[..., Tensor]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError):  # a user's annotations may name what only a type checker imports
        return inspect.signature(function)


PARAMETERS: dict[str, type] = {
    name: getattr(parameter.annotation, "__origin__", parameter.annotation)
    for kl_type in DIVERGENCES
    for name, parameter in parameters_of(kl_type).items()
}
"""The parameters of all divergences with their types: each is a key of the `loss` section."""


def parameter_problems(kl_type: str, parameters: Mapping[str, Any], *, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each parameter that the divergence does not take, lacks, or has out of range.

    Args:
        parameters: the values of `loss.<name>`, for names in PARAMETERS.
        kwargs: the values of `loss.kwargs.<name>`, for all other names.
    """
    try:
        taken = parameters_of(kl_type)
    except ConfigError as error:
        yield from error.problems
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name in kwargs:
        if name in PARAMETERS:
            yield f"loss.kwargs.{name}: set loss.{name} instead"
        elif name not in taken and not takes_any:
            yield f"loss.kwargs.{name}: loss.kl_type={kl_type} has {', '.join(taken) or 'no parameters'}; leave it out"
    for name, parameter in taken.items():
        key = f"loss.{name}" if name in PARAMETERS else f"loss.kwargs.{name}"
        value = {**kwargs, **parameters}.get(name, parameter.default)
        if value is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            yield f"{key}: a value is needed, with loss.kl_type={kl_type}"
        for allowed in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(allowed, Range) and value is not parameter.empty and value not in allowed:
                yield f"{key}={value}: must lie in {allowed}, with loss.kl_type={kl_type}"


def _log_mixture(loga: Tensor, logb: Tensor, *, weight: float) -> Tensor:
    """Return log(weight a + (1 - weight) b), exact at weights 0 and 1."""
    log_weight, log_other = (math.log(x) if x > 0 else -math.inf for x in (weight, 1 - weight))
    return (loga + log_weight).logaddexp(logb + log_other)
