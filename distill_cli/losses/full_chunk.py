"""A chunk of tokens whose divergence is that of the whole distributions.

With d(log p, log q) the divergence's term of a token of the vocabulary, D = sum_v d its value, q = softmax(y) the
student's distribution, g_v = dd/dlog q_v, G = sum g, a = dL/dD and g_s = dL/dlogq of the sampled token:

    dL/dy_v = a g_v - q_v (a G + g_s), and g_s more for the sampled token

The student's ids that the teacher does not score, if there are any, are one more class, as they are in the rest of a
top-k of all ids that it scores.

Shape letters: n tokens, b tokens of a block, V vocabulary (under tensor parallelism this rank's shard), v its ids that
the teacher scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.losses.class_chunk import MIN_REST_SUM
from distill_cli.losses.groups import Grouped
from distill_cli.losses.head import Merged, Shard
from distill_cli.losses.softmax import Softmax, by_blocks
from distill_cli.losses.teacher_chunk import ABSENT_BELOW, TeacherChunk
from distill_cli.losses.token_loss import TokenLoss, Tokens

Terms = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class FullChunk:
    """Both models' logits, turned in their own memory into the divergence and its gradient."""

    def __init__(
        self,
        logits_nV: torch.Tensor,
        teacher: TeacherChunk,
        sampled_ids_n: torch.Tensor,
        *,
        terms: Terms,
        shard: Shard,
        merged: Merged | None,
        with_gradient: bool,
        grouped: Grouped | None = None,
    ) -> None:
        """Take logits at temperature 1; with the gradient the teacher's are overwritten by g. Four collectives of [n].

        Args:
            terms: the divergence's, elementwise (`TokenLoss.terms`).
        """
        self.shard, self.merged, self.logits_nV, self.grad_nV = shard, merged, logits_nV, teacher.logits_nV
        self.grouped, class_ids_n = grouped, sampled_ids_n if grouped is None else grouped.class_ids_n
        self.softmax, temperature = Softmax.of(logits_nV, shard), shard.temperature
        self.entropy_n, self.argmax_n = self.softmax.entropy_n, self.softmax.argmax_n
        self.sampled_index_n1, self.owns_sampled_n1 = shard.locate(sampled_ids_n[:, None])
        class_index_n1, owns_class_n1 = shard.locate(class_ids_n[:, None])
        sampled_n = logits_nV.gather(1, class_index_n1).masked_fill_(~owns_class_n1, 0.0)[:, 0]
        shard.all_reduce(sampled_n, dist.ReduceOp.SUM)
        log_sum_n, class_n = self.softmax.log_sum_at_one_n, sampled_n
        if merged is not None:
            class_n = torch.where(merged.has(sampled_ids_n), merged.logit_n, sampled_n)
            sampled_n = merged.sampled_logit(sampled_ids_n, sampled_n)
            if temperature != 1.0:  # the class's exponential at temperature 1 is not the sum of the tokens'
                one_class_n = merged.logit_n - log_sum_n
                own_n = (merged.logits_nE - log_sum_n[:, None]).exp().sum(-1)
                log_sum_n = log_sum_n + (own_n - one_class_n.exp()).log1p()
        self.sampled_logp_n = sampled_n - log_sum_n if grouped is None else grouped.sampled_logp_n
        self.class_logp_n = class_n / temperature - self.softmax.log_sum_n

        self.num_ids = teacher.num_ids
        both = logits_nV[:, : self.num_ids], teacher.logits_nV[:, : self.num_ids]
        log_sums = self.softmax.log_sum_n[:, None], teacher.softmax.log_sum_n[:, None]
        self.has_gaps, self.teacher_rest_n = teacher.rest_n is not None, teacher.rest_n
        options: dict[str, Any] = {"temperature": temperature, "overwrites": with_gradient, "has_gaps": self.has_gaps}
        measured = by_blocks(measure, *both, *log_sums, terms=terms, **options)
        sums_n5 = shard.all_reduce(measured[0], dist.ReduceOp.SUM)
        sums_n4, gaps_n = sums_n5[:, :4], sums_n5[:, 4]
        self.rest_factor_n: torch.Tensor | None = None
        self.rest_n = torch.zeros_like(sampled_n)
        if teacher.vocab_size < shard.total or self.has_gaps:
            sums_n4 = sums_n4 + self._rest_sums(terms, gaps_n, teacher.rest_n)
        self.divergence_n, self.grad_sum_n, self.kl_forward_n, self.kl_reverse_n = sums_n4.unbind(-1)

    def _rest_sums(self, terms: Terms, gaps_n: torch.Tensor, teacher_n: torch.Tensor | None) -> torch.Tensor:
        """Return what the class of ids that the teacher does not score adds to `measure`'s sums [n, 4].

        Its probability is limited as in `with_rest`, for a top-k that has all of the teacher's.

        Args:
            gaps_n: the student's probability of absent ids.
            teacher_n: the teacher's probability of the class; None if it has none.
        """
        own_n = (
            (self.logits_nV[:, self.num_ids :] / self.shard.temperature - self.softmax.log_sum_n[:, None]).exp().sum(-1)
        )
        self.rest_n = self.shard.all_reduce(own_n, dist.ReduceOp.SUM) + gaps_n
        logq_n1 = self.rest_n.clamp_min(MIN_REST_SUM).log()[:, None]
        eps = torch.finfo(logq_n1.dtype).eps
        logp_n1 = logq_n1.clamp_max(math.log(eps / 2))
        if teacher_n is not None:
            is_some_n = teacher_n >= 16 * eps
            rest_logp_n1 = teacher_n.clamp_min(eps / 2).log()[:, None]
            logp_n1 = torch.where(is_some_n[:, None], rest_logp_n1, torch.minimum(rest_logp_n1, logq_n1))
        zero_n1 = torch.zeros_like(logq_n1)
        (sums_n5,) = measure(logq_n1, logp_n1, zero_n1, zero_n1, terms=terms, temperature=1.0, overwrites=True)
        self.rest_factor_n = logp_n1[:, 0] / self.rest_n.clamp_min(MIN_REST_SUM)  # g was written over log p
        return sums_n5[:, :4]

    def logp_of(self, logits_nM: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of logits as they were given."""
        return logits_nM / self.shard.temperature - self.softmax.log_sum_n[:, None]

    def compare(self) -> dict[str, torch.Tensor]:
        """Return how both models compare, by the names of `HeadOutput`'s fields."""
        none_n0 = self.divergence_n.new_zeros(len(self.divergence_n), 0)
        return {
            "kl_forward_N": self.kl_forward_n,
            "kl_reverse_N": self.kl_reverse_n,
            "teacher_mass_N": torch.ones_like(self.rest_n) if self.teacher_rest_n is None else 1 - self.teacher_rest_n,
            "student_mass_N": 1 - self.rest_n,
            "teacher_logp_NC": none_n0,
            "student_logp_NC": none_n0,
        }

    def evaluate(self, token_loss: TokenLoss, tokens: Tokens, rows: slice) -> tuple[torch.Tensor, ...]:
        """Return divergence, weight and loss of each token [n]."""
        weights_n = token_loss.weights(self.divergence_n, tokens, rows)
        return self.divergence_n, weights_n, token_loss.total(self.divergence_n, weights_n, tokens, rows)

    def differentiate(
        self, token_loss: TokenLoss, tokens: Tokens, rows: slice, *, scale: float
    ) -> tuple[torch.Tensor, ...]:
        """Return divergence, weight and loss [n], and the gradient of the loss's sum [n, V].

        The gradient is that of the logits before their scale, made in the teacher's memory. A collective if tokens are
        merged.

        Args:
            scale: the head's (`LogitTransform.scale`).
        """
        divisor, grad_nV = self.shard.temperature / scale, self.grad_nV
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (self.divergence_n, self.sampled_logp_n)]
            weights_n = token_loss.weights(self.divergence_n, tokens, rows)
            loss_n = token_loss.total(leaves[0], weights_n, replace(tokens, sampled_logp_n=leaves[1]), rows)
            grads = torch.autograd.grad(loss_n.sum(), leaves, allow_unused=True)
        factor_n = torch.zeros_like(self.divergence_n) if grads[0] is None else grads[0] / divisor
        total_n = factor_n * self.grad_sum_n
        if grads[1] is not None:
            assert self.shard.temperature == 1.0, "the sampled token's log-probability is that of temperature 1"
            total_n = total_n + grads[1] / divisor
        if self.num_ids < grad_nV.shape[1]:
            grad_nV[:, self.num_ids :] = 0.0
        columns = [self.softmax.log_sum_n[:, None], factor_n[:, None], total_n[:, None]]
        rest_n = torch.zeros_like(factor_n) if self.rest_factor_n is None else factor_n * self.rest_factor_n
        options: dict[str, Any] = {"temperature": self.shard.temperature, "has_gaps": self.has_gaps}
        by_blocks(finish, grad_nV, self.logits_nV, *columns, rest_n[:, None], **options)
        if self.rest_factor_n is not None and self.num_ids < grad_nV.shape[1]:
            rest_nr = self.logits_nV[:, self.num_ids :] / self.shard.temperature - self.softmax.log_sum_n[:, None]
            grad_nV[:, self.num_ids :].addcmul_(rest_nr.exp_(), rest_n[:, None])
        if self.merged is not None:
            self.merged.spread(grad_nV)
        if self.grouped is not None:
            self.grouped.spread(grad_nV)
        if grads[1] is not None:
            grad_n1 = (grads[1] / divisor)[:, None].masked_fill(~self.owns_sampled_n1, 0.0)
            grad_nV.scatter_add_(1, self.sampled_index_n1, grad_n1)
        return self.divergence_n, weights_n, loss_n.detach(), grad_nV


def measure(
    logits_bv: torch.Tensor,
    teacher_bv: torch.Tensor,
    log_sum_b1: torch.Tensor,
    teacher_log_sum_b1: torch.Tensor,
    *,
    terms: Terms,
    temperature: float,
    overwrites: bool,
    has_gaps: bool = False,
) -> tuple[torch.Tensor]:
    """Return sums over the ids [b, 5]: the terms, their gradient in log q, the terms of KL(p || q) and of KL(q || p),
    and the student's probability of absent ids, which add nothing to the others.

    Args:
        overwrites: compute the gradient, and write it over the teacher's logits, NaN for absent ids; else its sum is 0.
        has_gaps: whether ids may be absent.
    """
    logq_bv, logp_bv = logits_bv / temperature - log_sum_b1, teacher_bv / temperature - teacher_log_sum_b1
    gaps_b = torch.zeros_like(log_sum_b1[:, 0])
    if has_gaps:
        is_gap_bv = teacher_bv < ABSENT_BELOW
        gaps_b = torch.where(is_gap_bv, logq_bv.exp(), 0.0).sum(-1)
        logp_bv = torch.where(is_gap_bv, logq_bv, logp_bv)
    ratio_bv = logp_bv - logq_bv
    forward_b, reverse_b = (logp_bv.exp() * ratio_bv).sum(-1), -(logq_bv.exp() * ratio_bv).sum(-1)
    if overwrites:
        term_bv, pull, *_ = torch.func.vjp(lambda logq: terms(logp_bv, logq), logq_bv)
        (grad_bv,) = pull(torch.ones_like(term_bv))
        if has_gaps:
            term_bv = torch.where(is_gap_bv, 0.0, term_bv)
            grad_bv = torch.where(is_gap_bv, 0.0, grad_bv)
            teacher_bv.copy_(torch.where(is_gap_bv, torch.nan, grad_bv))
        else:
            teacher_bv.copy_(grad_bv)
        grad_sum_b = grad_bv.sum(-1)
    else:
        term_bv, grad_sum_b = terms(logp_bv, logq_bv), torch.zeros_like(forward_b)
        if has_gaps:
            term_bv = torch.where(is_gap_bv, 0.0, term_bv)
    return (torch.stack([term_bv.sum(-1), grad_sum_b, forward_b, reverse_b, gaps_b], dim=-1),)


def finish(
    grad_bV: torch.Tensor,
    logits_bV: torch.Tensor,
    log_sum_b1: torch.Tensor,
    factor_b1: torch.Tensor,
    total_b1: torch.Tensor,
    rest_b1: torch.Tensor,
    *,
    temperature: float,
    has_gaps: bool,
) -> tuple[torch.Tensor]:
    """Turn g into a g - q (a G + g_s), in place; an absent id has its part of the rest's, q times `rest_b1`."""
    q_bV = (logits_bV / temperature - log_sum_b1).exp()
    if has_gaps:
        is_gap_bV = grad_bV.isnan()
        grad_bV.copy_(torch.where(is_gap_bV, rest_b1 * q_bV, factor_b1 * grad_bV) - total_b1 * q_bV)
        return (factor_b1,)
    grad_bV.copy_(factor_b1 * grad_bV - total_b1 * q_bV)
    return (factor_b1,)
