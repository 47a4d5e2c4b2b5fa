"""A chunk of tokens whose loss needs the student's log-probabilities of some classes alone.

The classes are K ids of each token and the rest of the vocabulary together. With the student's logits z, y = z /
temperature, q = softmax(y), g = dL/dlogq of a class, g_s = dL/dlogq of the sampled token, G = sum g + g_s, entropy E
and g_E = dL/dE:

    dL/dy_v = g_v                   - q_v G - g_E q_v (log q_v + E)      for v among the ids
    dL/dy_v = q_v (g_rest / q_rest) - q_v G - g_E q_v (log q_v + E)      for all others

and g_s more for the sampled token. The rest's mass is a sum of its own, not 1 - sum q: precise to float32's relative
rounding however small it is.

Shape letters: n tokens, V vocabulary (under tensor parallelism this rank's shard), K ids, C = K + 1 classes: the ids,
then the rest.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from distill_cli.losses.distill_loss import PADDING_LOGP, bucket_classes
from distill_cli.losses.divergence import forward, reverse
from distill_cli.losses.groups import Grouped
from distill_cli.losses.head import Merged, Shard
from distill_cli.losses.teacher_chunk import TeacherView
from distill_cli.losses.token_loss import TokenLoss, Tokens

MIN_REST_SUM = 1e-30
"""The least sum of the rest's exponentials, where the likeliest token's is 1: log q_rest stays above -70 - log(sum of
all), and g_rest / q_rest stays finite."""


class ClassChunk:
    """The student's logits, turned in their own memory into what loss and gradient need."""

    def __init__(
        self,
        logits_nV: torch.Tensor,
        scratch_nV: torch.Tensor,
        teacher: TeacherView,
        sampled_ids_n: torch.Tensor,
        *,
        shard: Shard,
        merged: Merged | None,
        grouped: Grouped | None = None,
    ) -> None:
        """Take logits at temperature 1, and overwrite both buffers.

        Two collectives: a MAX of [n] and a SUM of [n, K + 3] (K + 4 if the temperature is not 1).
        """
        self.temperature, self.merged, self.grouped = shard.temperature, merged, grouped
        class_ids_n = sampled_ids_n if grouped is None else grouped.class_ids_n
        ids_nK, self.teacher_logp_nK = teacher.ids_nK, teacher.logp_nK
        is_scaled = shard.temperature != 1.0
        local_peak_n, local_argmax_n = logits_nV.max(-1)
        self.peak_n = peak_n = shard.all_reduce(local_peak_n.clone(), dist.ReduceOp.MAX)
        # A token id if the largest logit is in this shard, else one beyond any vocabulary.
        self.argmax_n = torch.where(local_peak_n == peak_n, local_argmax_n + shard.first, torch.iinfo(torch.int64).max)
        logits_nV.sub_(peak_n[:, None])
        index, owned = shard.locate(torch.cat([ids_nK, class_ids_n[:, None]], dim=-1))
        self.index_nK, self.owned_nK = index[:, :-1], owned[:, :-1]
        self.sampled_index_n1, self.owns_sampled_n1 = shard.locate(sampled_ids_n[:, None])
        picked = [logits_nV.gather(1, index).masked_fill_(~owned, 0.0)]
        if is_scaled:
            picked.append(torch.exp(logits_nV, out=scratch_nV).sum(-1, keepdim=True))
            logits_nV.mul_(1 / self.temperature)
        # exp(logit - the row's largest), 0 at the ids, which leaves the rest; and that times the same difference.
        exp_nV = self.exp_nV = torch.exp(logits_nV, out=scratch_nV)
        exp_nV.scatter_add_(1, self.index_nK, exp_nV.gather(1, self.index_nK).neg_().masked_fill_(~self.owned_nK, 0.0))
        self.exp_logit_nV = logits_nV.mul_(exp_nV)
        sums = torch.cat([exp_nV.sum(-1, keepdim=True), self.exp_logit_nV.sum(-1, keepdim=True), *picked], dim=-1)
        shard.all_reduce(sums, dist.ReduceOp.SUM)

        num_ids = ids_nK.shape[1]
        rest_sum_n, rest_exp_logit_n, sampled_n = sums[:, 0], sums[:, 1], sums[:, 2 + num_ids]
        class_n = sampled_n
        if merged is not None:
            class_n = torch.where(merged.has(sampled_ids_n), merged.logit_n - peak_n, sampled_n)
            sampled_n = merged.sampled_logit(sampled_ids_n, sampled_n + peak_n) - peak_n
            if is_scaled:  # the class's exponential at temperature 1 is not the sum of the tokens'
                sums[:, -1] += (merged.logits_nE - peak_n[:, None]).exp().sum(-1) - (merged.logit_n - peak_n).exp()
        ids_logit_nK = sums[:, 2 : 2 + num_ids] * (1 / self.temperature)
        padding_nK = ids_nK < 0
        ids_exp_nK = ids_logit_nK.exp().masked_fill_(padding_nK, 0.0)
        self.sum_n = rest_sum_n + ids_exp_nK.sum(-1)  # of all exponentials, over all shards
        log_sum_n = self.sum_n.log()
        ids_logp_nK = (ids_logit_nK - log_sum_n[:, None]).masked_fill_(padding_nK, PADDING_LOGP)
        self.rest_sum_n = rest_sum_n.clamp_min(MIN_REST_SUM)
        self.logp_nC = torch.cat([ids_logp_nK, (self.rest_sum_n.log() - log_sum_n)[:, None]], dim=-1)
        self.entropy_n = log_sum_n - (rest_exp_logit_n + (ids_exp_nK * ids_logit_nK).sum(-1)) / self.sum_n
        self.sampled_logp_n = sampled_n - (sums[:, -1].log() if is_scaled else log_sum_n)
        if grouped is not None:
            self.sampled_logp_n = grouped.sampled_logp_n
        self.class_logp_n = class_n * (1 / self.temperature) - log_sum_n

    def logp_of(self, logits_nM: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of logits as they were given."""
        return (logits_nM - self.peak_n[:, None]) / self.temperature - self.sum_n.log()[:, None]

    def compare(self) -> dict[str, torch.Tensor]:
        """Return how both models compare, by the names of `HeadOutput`'s fields."""
        teacher_nC, student_nC = bucket_classes(self.teacher_logp_nK, self.logp_nC)
        return {
            "kl_forward_N": forward(teacher_nC, student_nC).sum(-1),
            "kl_reverse_N": reverse(teacher_nC, student_nC).sum(-1),
            "teacher_mass_N": teacher_nC[:, :-1].exp().sum(-1),
            "student_mass_N": student_nC[:, :-1].exp().sum(-1),
            "teacher_logp_NC": teacher_nC,
            "student_logp_NC": student_nC,
        }

    def evaluate(self, token_loss: TokenLoss, tokens: Tokens, rows: slice) -> tuple[torch.Tensor, ...]:
        """Return divergence, weight and loss of each token [n]."""
        divergence_n = token_loss.divergence(self.teacher_logp_nK, self.logp_nC, self.entropy_n, rows)
        weights_n = token_loss.weights(divergence_n, tokens, rows)
        return divergence_n, weights_n, token_loss.total(divergence_n, weights_n, tokens, rows)

    def differentiate(
        self, token_loss: TokenLoss, tokens: Tokens, rows: slice, *, scale: float
    ) -> tuple[torch.Tensor, ...]:
        """Return divergence, weight and loss [n], and the gradient of the loss's sum [n, V].

        The gradient is that of the logits before their scale, made in the logits' memory.

        The formula stands at the top of the file. A collective if tokens are merged.

        Args:
            scale: the head's (`LogitTransform.scale`), whose derivative costs no pass over [n, V] here.
        """
        divisor = self.temperature / scale
        with torch.enable_grad():
            logp_nC, entropy_n, sampled_logp_n = (
                x.detach().requires_grad_() for x in (self.logp_nC, self.entropy_n, self.sampled_logp_n)
            )
            divergence_n = token_loss.divergence(self.teacher_logp_nK, logp_nC, entropy_n, rows)
            weights_n = token_loss.weights(divergence_n.detach(), tokens, rows)
            loss_n = token_loss.total(divergence_n, weights_n, replace(tokens, sampled_logp_n=sampled_logp_n), rows)
            leaves = (logp_nC, entropy_n, sampled_logp_n)
            grads = torch.autograd.grad(loss_n.sum(), leaves, allow_unused=True)
        grad_logp_nC = torch.zeros_like(self.logp_nC) if grads[0] is None else grads[0] / divisor
        grad_nK, grad_rest_n = grad_logp_nC[:, :-1], grad_logp_nC[:, -1]
        logp_nK = self.logp_nC[:, :-1]
        total_n = grad_logp_nC.sum(-1)
        if grads[2] is not None:
            assert self.temperature == 1.0, "the sampled token's log-probability is that of temperature 1"
            grad_sampled_n = grads[2] / divisor
            total_n = total_n + grad_sampled_n
        grad_nK = grad_nK - logp_nK.exp() * total_n[:, None]
        factor_n = grad_rest_n / self.rest_sum_n - total_n / self.sum_n
        if grads[1] is None:  # the loss does not read the entropy
            grad_nV = self.exp_nV.mul_(factor_n[:, None])
        else:
            grad_entropy_n = grads[1] / divisor
            share_n = grad_entropy_n / self.sum_n
            factor_n = factor_n - share_n * (self.entropy_n - self.sum_n.log())
            grad_nV = self.exp_nV.mul_(factor_n[:, None])
            grad_nV.addcmul_(self.exp_logit_nV, share_n[:, None], value=-1)
            surprise_nK = logp_nK + self.entropy_n[:, None]
            grad_nK = grad_nK - grad_entropy_n[:, None] * logp_nK.exp() * surprise_nK
        grad_nV.scatter_add_(1, self.index_nK, grad_nK.masked_fill(~self.owned_nK, 0.0))
        if self.merged is not None:
            self.merged.spread(grad_nV)
        if self.grouped is not None:
            self.grouped.spread(grad_nV)
        if grads[2] is not None:
            grad_n1 = grad_sampled_n[:, None].masked_fill(~self.owns_sampled_n1, 0.0)
            grad_nV.scatter_add_(1, self.sampled_index_n1, grad_n1)
        return divergence_n.detach(), weights_n, loss_n.detach(), grad_nV
