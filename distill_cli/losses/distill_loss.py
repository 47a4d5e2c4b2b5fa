"""Loss of each token: a divergence between the teacher's top-k and the student, with a rule for all other tokens.

Left out: the divergences themselves (divergence.py), reductions and weights over tokens (the caller's), logits
(linear_divergence.py).

Shape letters: N tokens, K the teacher's top-k, C = K + 1 classes: the top-k, then everything outside it (the rest).
"""

import math
from typing import Any

import torch

from distill_cli.errors import ConfigError
from distill_cli.losses.divergence import SIGNATURES, Divergence

PADDING_LOGP = -1e4
"""Log-probability of an absent class: its probability is exactly 0, and its gradients are finite."""
ZERO_LOGP = -100.0
"""Teacher's log-probability of tokens outside its top-k under the `zero` tail (NeMo RL's value)."""
TAILS = ("bucket", "renormalize", "zero")


class DistillLoss:
    """The divergence of the student from the teacher at each token, given the teacher's top-k.

    `bucket`: the rest is one more class. `renormalize`: both sides are renormalised on the top-k. `zero`: the teacher
    is renormalised on its top-k and exp(-100) on every other token.

    Args:
        kl_type: one of DIVERGENCES, or `pkg.module:function`.
        tail: one of TAILS.
        parameters: the divergence's, as in `Signatures.resolve`.

    Raises:
        ConfigError: no such divergence or tail, a parameter that the divergence does not take, or a tail that the
            divergence does not support.
    """

    def __init__(self, *, kl_type: str, tail: str = "bucket", **parameters: Any) -> None:
        if tail not in TAILS:
            raise ConfigError(f"loss.tail={tail}: must be one of {', '.join(TAILS)}")
        self.divergence = SIGNATURES.resolve(kl_type, **parameters)
        self.tail = tail
        self.outside = _outside_coefficients(self.divergence, kl_type=kl_type) if tail == "zero" else (0.0, 0.0)

    def __call__(
        self, teacher_logp_NK: torch.Tensor, student_logp_NC: torch.Tensor, student_entropy_N: torch.Tensor
    ) -> torch.Tensor:
        """Return the divergence at each token.

        A class that is absent on both sides (PADDING_LOGP or less in both) adds nothing, to value or gradient.

        Args:
            teacher_logp_NK: float [N, K], normalised over the whole vocabulary. -inf counts as PADDING_LOGP.
            student_logp_NC: float [N, K + 1], normalised over the whole vocabulary; the last column is the rest's.
            student_entropy_N: float [N], over the whole vocabulary; read only by the `zero` tail.

        Returns:
            float32 [N] (float64 of float64 inputs), differentiable in the student's two arguments.
        """
        dtype = torch.promote_types(student_logp_NC.dtype, torch.float32)
        teacher_NK = _finite(teacher_logp_NK.to(dtype))
        student_NC = student_logp_NC.to(dtype)
        num_topk = teacher_NK.shape[-1]
        assert student_NC.shape[-1] == num_topk + 1, "the student's last column is the rest's"
        if self.tail == "bucket":
            return self.divergence(with_rest(teacher_NK, student_NC[:, -1]), student_NC).sum(-1)
        teacher_NK, topk_NK = teacher_NK.log_softmax(-1), student_NC[:, :num_topk]
        if self.tail == "renormalize":
            return self.divergence(teacher_NK, topk_NK.log_softmax(-1)).sum(-1)
        return self.divergence(teacher_NK, topk_NK).sum(-1) + self._outside(student_NC, student_entropy_N.to(dtype))

    def _outside(self, student_NC: torch.Tensor, student_entropy_N: torch.Tensor) -> torch.Tensor:
        """Return the sum of the terms of all tokens outside the top-k, where log p = ZERO_LOGP, from [C] alone."""
        per_log, per_mass = self.outside
        topk_NK = student_NC[:, :-1]
        sum_q_logq_N = -student_entropy_N - (topk_NK.exp() * topk_NK).sum(-1)
        return per_log * sum_q_logq_N + per_mass * student_NC[:, -1].exp()


def bucket_classes(teacher_logp_NK: torch.Tensor, student_logp_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of teacher and student on the `bucket` tail's classes, detached: [N, C] each.

    Args and dtypes are those of `DistillLoss.__call__`.
    """
    student_NC = student_logp_NC.detach()
    return with_rest(_finite(teacher_logp_NK.to(student_NC.dtype)), student_NC[:, -1]), student_NC


def with_rest(logp_NK: torch.Tensor, student_rest_N: torch.Tensor) -> torch.Tensor:
    """Append the rest's log-probability to the teacher's: [N, K] -> [N, K + 1].

    1 - sum p is computed in float64, so its only error is the log-probabilities' own rounding, a dozen eps at most. A
    remainder within that error is limited to the student's rest: a teacher whose top-k has all its probability (k = V)
    then adds nothing to the forward term, where log q of an empty rest is about -70, and the reverse term's log p stays
    above -17.

    Args:
        student_rest_N: [N], the student's log-probability of the rest.
    """
    eps = torch.finfo(logp_NK.dtype).eps
    rest_N = 1 - logp_NK.double().exp().sum(-1)
    rest_logp_N = rest_N.clamp_min(eps / 2).log().to(logp_NK.dtype)
    in_doubt_N = torch.minimum(rest_logp_N, student_rest_N.detach())
    return torch.cat([logp_NK, torch.where(rest_N < 16 * eps, in_doubt_N, rest_logp_N)[:, None]], dim=-1)


def _finite(logp: torch.Tensor) -> torch.Tensor:
    return logp.masked_fill(logp == -math.inf, PADDING_LOGP)


def _outside_coefficients(divergence: Divergence, *, kl_type: str) -> tuple[float, float]:
    """Return (a, b) such that the divergence's term is q (a log q + b) where log p = ZERO_LOGP.

    Every divergence here has that form (to within exp(-100)), so the sum over a vocabulary needs only sum q log q and
    sum q, which follow from the student's entropy, and no division by a rest that may be 0.

    Raises:
        ConfigError: the term has another form.
    """
    logq = torch.tensor([-1.0, -2.0, -5.0], dtype=torch.float64)
    first, second, third = (divergence(torch.full_like(logq, ZERO_LOGP), logq) / logq.exp()).tolist()
    per_log, per_mass = first - second, 2 * first - second
    # A loose tolerance: a skew of about exp(-100) bends the line a little.
    if not math.isclose(third, per_mass - 5 * per_log, rel_tol=0.02, abs_tol=1e-9):
        raise ConfigError(
            f"loss.kl_type={kl_type}: loss.tail=zero needs terms that tend to q (a log q + b) as p tends to 0; use "
            "loss.tail=bucket"
        )
    return per_log, per_mass
