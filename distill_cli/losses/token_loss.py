"""What the fused head asks of a loss: the divergence at each token, and what becomes of it.

Shape letters: n tokens of a chunk, K ids of the support, C = K + 1 classes: the ids, then the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Tokens:
    """Both models' predictions at a chunk's tokens, [n] each; detached but for `sampled_logp_n`."""

    entropy_n: torch.Tensor
    """The student's entropy, in nats."""
    sampled_logp_n: torch.Tensor
    """The student's log-probability of the sampled token at temperature 1; differentiable where a gradient is
    computed."""
    class_logp_n: torch.Tensor
    """The student's log-probability of the sampled token at the loss's temperature, or of the class of merged tokens
    that it is in; not differentiable."""
    teacher_sampled_logp_n: torch.Tensor
    """The teacher's, likewise."""
    teacher_entropy_n: torch.Tensor
    """The teacher's entropy: over its whole vocabulary, or, if only its top-k is known, with the rest as one class."""
    teachability_n: torch.Tensor | None = None
    """The teacher's probability of the student's top-k; None unless `TokenLoss.reads_teachability`."""


class TokenLoss(Protocol):
    """The loss of each token. `rows` are a chunk's among all tokens of the call."""

    reads_teachability: bool
    """Whether `total` reads `Tokens.teachability_n`."""
    terms: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """The divergence's term of each class from (log p, log q), elementwise: for the whole vocabulary. The same object
    in each call, since it is compiled on GPUs."""

    def divergence(
        self, teacher_logp_nK: torch.Tensor, student_logp_nC: torch.Tensor, entropy_n: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """Return the divergence at each token [n] from the classes' log-probabilities.

        It must read the student's; reading the entropy too costs one more pass over the chunk.
        """

    def weights(self, divergence_n: torch.Tensor, tokens: Tokens, rows: slice) -> torch.Tensor:
        """Return the weight of each token [n], without gradient; 1 where none are set."""

    def total(self, divergence_n: torch.Tensor, weights_n: torch.Tensor, tokens: Tokens, rows: slice) -> torch.Tensor:
        """Return the loss [n] made of the divergence, differentiable in it: weighted, with the one division."""
