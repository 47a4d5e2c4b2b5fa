"""Probabilities of the student's tokens by a teacher with a tokenizer of its own (`tokens.text_plan`).

With A the product of the teacher's probabilities of the text's tokens before a place, P its distribution there, and f
the place at which the student's token begins in the teacher's tokens:

    weights of what it may be writing    A(f) if a token begins here, A(p) P_p(u) of a token u that began at p
    Q(v)        = sum of the weights of u with v next + A(f) sum of P_f(u) with v first; divided by the sum of weights
    a move      = A(f) / (sum of weights) x A(p) / A(f) x P_p(u), from one token of the student to another

Shape letters: T tokens of the teacher, N of the student, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEFT = 1e-6
"""The least share of a token's probability that moves leave: less is their rounding, and the token has none."""


@dataclass(frozen=True)
class Parts:
    """Probabilities of the student's tokens that do not come from the teacher's next token, as parts that add up."""

    weight_N: torch.Tensor
    """By which the teacher's next token counts; where one begins earlier, by which its probability counts."""
    rows_E: torch.Tensor
    tokens_E: torch.Tensor
    masses_E: torch.Tensor
    """The student's token at which each part is, the one that it is of, and its probability; some are below 0."""
    residue_N: torch.Tensor
    """Probability of no token of the student."""


def weigh(
    before_T: torch.Tensor,
    first_N: torch.Tensor,
    is_aligned_N: torch.Tensor,
    begun_E4: torch.Tensor,
    begun_probs_E: torch.Tensor,
    moves_E5: torch.Tensor,
    move_probs_E: torch.Tensor,
) -> Parts:
    """Return the parts of each of the student's tokens.

    Args:
        before_T: log A at each place.
        first_N, is_aligned_N, begun_E4, moves_E5: see `tokens.text_plan.TextPlan`.
        begun_probs_E, move_probs_E: the teacher's probability of each entry's token at its place.
    """
    own_N = before_T[first_N]
    rows_E, places_E, _, targets_E = begun_E4.unbind(1)
    peak_N = torch.where(is_aligned_N, own_N, -torch.inf)
    peak_N = peak_N.scatter_reduce(0, rows_E, before_T[places_E], "amax")
    peak_N = torch.where(peak_N == -torch.inf, own_N, peak_N)
    masses_E = begun_probs_E * (before_T[places_E] - peak_N[rows_E]).exp()
    own_weight_N = (own_N - peak_N).exp()
    total_N = torch.where(is_aligned_N, own_weight_N, 0.0).index_add(0, rows_E, masses_E)
    total_N = torch.where(total_N > 0, total_N, 1.0)
    masses_E = masses_E / total_N[rows_E]
    is_lost_E = targets_E < 0
    residue_N = torch.zeros_like(total_N).index_add(0, rows_E[is_lost_E], masses_E[is_lost_E])
    weight_N = own_weight_N / total_N
    move_rows_E, move_places_E, _, takers_E, holders_E = moves_E5.unbind(1)
    between_E = (before_T[move_places_E] - own_N[move_rows_E]).exp()
    moved_E = weight_N[move_rows_E] * between_E * move_probs_E
    has_holder_E = holders_E >= 0
    return Parts(
        weight_N,
        torch.cat([rows_E[~is_lost_E], move_rows_E, move_rows_E[has_holder_E]]),
        torch.cat([targets_E[~is_lost_E], takers_E, holders_E[has_holder_E]]),
        torch.cat([masses_E[~is_lost_E], moved_E, -moved_E[has_holder_E]]),
        residue_N,
    )
