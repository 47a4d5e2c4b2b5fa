"""The loss at a token: a function of the log-probabilities of teacher and student, summed over the tokens compared."""

from torch import Tensor


def hellinger(logp: Tensor, logq: Tensor, *, scale: float = 2.0) -> Tensor:
    """Return scale x (sqrt p - sqrt q)^2, the squared Hellinger distance's term of each token.

    It is bounded, so no single token dominates. `loss.kwargs.scale=4` sets the parameter.
    """
    return scale * ((logp / 2).exp() - (logq / 2).exp()).square()
