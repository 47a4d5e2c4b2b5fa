"""Divergences between teacher and student, one elementwise function each. No torch at import time.

A divergence is a function of (log p, log q) of a class that returns the class's term of D(p || q), where p is the
teacher and q the student. Its keyword parameters are keys of the `loss` section: their types, defaults and ranges are
read from its signature before a run starts. The tail handles everything outside the teacher's top-k, in the same way
for all divergences (distill_loss.py).

To add one, write the function, put it in DIVERGENCES, and write conf/loss/<name>.yaml with its parameters; tests
enumerate both. It may use only methods of tensors.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from distill_cli.losses.signature import Range, Signatures

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # signatures are evaluated where torch is not imported

Divergence = Callable[[Tensor, Tensor], Tensor]


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


def l1(logp: Tensor, logq: Tensor) -> Tensor:
    """The sum of |p - q|: twice the total variation."""
    return (logp.exp() - logq.exp()).abs()


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (forward, reverse, mixed, jsd, skew_forward, skew_reverse, l1)
}


SIGNATURES = Signatures("loss.kl_type", DIVERGENCES, takes=("logp", "logq"), is_choice=False)


def _log_mixture(loga: Tensor, logb: Tensor, *, weight: float) -> Tensor:
    """Return log(weight a + (1 - weight) b), exact at weights 0 and 1."""
    log_weight, log_other = (math.log(x) if x > 0 else -math.inf for x in (weight, 1 - weight))
    return (loga + log_weight).logaddexp(logb + log_other)
