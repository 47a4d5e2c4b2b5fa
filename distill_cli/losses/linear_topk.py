"""The fused head: from hidden states to a loss on the teacher's top-k, without ever holding [tokens, vocabulary].

Tokens pass in chunks. The loss needs only the student's log-probabilities of K + 1 classes (the top-k, and the rest of
the vocabulary together) and its entropy, and so its gradient is known as soon as a chunk's logits are: the chunk's part
of the gradients of hidden states and weight is made before its logits are forgotten. Logits are made once, three matrix
products in all, as without fusing. (Liger Kernel's fused linear losses do the same.)

With logits z (divided by the temperature), q = softmax(z), g = dL/dlogq of a class, G = sum g over the classes, entropy
E and g_E = dL/dE:

    dL/dz_v = g_v                   - q_v G - g_E q_v (log q_v + E)      for v in the top-k
    dL/dz_v = q_v (g_rest / q_rest) - q_v G - g_E q_v (log q_v + E)      for all others

The rest's mass is a sum of its own, not 1 - sum q: right to float32's relative precision however little it is.

Left out: a bias and capped logits (such models are refused when loaded), backward through backward.

Shape letters: N tokens, n tokens of a chunk, H hidden size, V vocabulary (under tensor parallelism this rank's shard),
K the teacher's top-k, C = K + 1 classes: the top-k, then the rest; M the student's own likeliest, where asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from distill_cli.losses.distill_loss import PADDING_LOGP

TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""(student_logp_nC, student_entropy_n, rows) -> [n], already weighted; `rows` are the chunk's among all N. It must read
the log-probabilities; reading the entropy too costs one more pass over the chunk."""

MIN_BUFFER_BYTES = 2**26
"""The chunks of a small head take at least this much."""
MIN_REST_SUM = 1e-30
"""The least sum of the rest's exponentials, where the likeliest token's is 1: log q_rest stays above -70 - log(sum of
all), and g_rest / q_rest stays finite."""
ABSENT_LOGIT = -1e30
"""Of a token that was merged into another: its exponential is 0, and so is that times it."""
PRODUCT_ROWS = 2**14
"""Rows of the weight's gradient that a low-precision product is added to at a time."""


@dataclass(frozen=True)
class HeadOutput:
    """What the head says of a micro-batch. All but `loss` are detached."""

    loss: torch.Tensor
    """Scalar float32: the sum of `loss_N`, differentiable in hidden states and weight."""
    loss_N: torch.Tensor
    """float32 [N], as `token_loss` returned it."""
    student_logp_NC: torch.Tensor
    """float32 [N, K + 1], at `temperature`: of the top-k ids, then of the rest."""
    entropy_N: torch.Tensor
    """float32 [N], over the whole vocabulary, at `temperature`."""
    argmax_N: torch.Tensor
    """int64 [N]: the likeliest token."""
    sampled_logp_N: torch.Tensor
    """float32 [N], at temperature 1: what the sampler should have said of its tokens."""
    top_ids_NM: torch.Tensor
    """int64 [N, M]: the student's own `num_top` likeliest tokens, the likeliest first."""
    top_logp_NM: torch.Tensor
    """float32 [N, M], at `temperature`."""

    @property
    def topk_logp_NK(self) -> torch.Tensor:
        return self.student_logp_NC[:, :-1]


def linear_topk_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    topk_ids_NK: torch.Tensor,
    token_loss: TokenLoss,
    *,
    sampled_ids_N: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    num_top: int = 0,
    merged_eos_ids: Sequence[int] = (),
) -> HeadOutput:
    """The sum over tokens of `token_loss`, for the student whose logits are hidden_NH weight_VH^T / temperature.

    Logits and all that is made of them are float32, whatever the inputs are (float64 of float64 inputs). GPUs multiply
    low-precision inputs as they are and accumulate in float32; elsewhere a float32 copy is made of them for the call.
    The gradient is made here, unless nothing asks for it; backward, which can run once, multiplies it by the gradient
    of `loss`.

    Args:
        hidden_NH: [N, H]; replicated over `group`.
        weight_VH: [V, H], of hidden_NH's dtype; with `group` this rank's part of an even split of the vocabulary, in
            the order of ranks.
        topk_ids_NK: int [N, K], distinct within a row. An id below 0 is padding: it counts neither for the top-k nor
            for the rest, and gets PADDING_LOGP, which the teacher should have there too.
        token_loss: called once a chunk, in order. It carries the tokens' weights and the one division.
        sampled_ids_N: int [N].
        group: the tensor-parallel ranks, all of which must call with the same tokens. Only [n, K + 4] and smaller
            cross ranks. Outputs are the same on all of them. Hidden's gradient is partial: sum it over `group`. The
            weight's is this shard's, and whole.
        merged_eos_ids: tokens that are one class under the first one's id, whose probability is the sum of theirs.
            The other ids must not be among the top-k. Costs two more collectives of [n] and [n, len(merged_eos_ids)].
        chunk_tokens: tokens at a time; changes results by rounding only. None: the two buffers [n, V] together take
            about as much as the weight's float32 gradient.
        num_top: the student's own likeliest tokens that are returned: one more pass over the logits, for a look at
            some sequences; training needs none. At most a shard's vocabulary.
    """
    needs_hidden, needs_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_NH, weight_VH))
    with torch.no_grad():
        hidden, weight = _operands(hidden_NH, weight_VH)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shard = _Shard.of(weight, group)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        size = _chunk_size(weight, num_tokens=hidden.shape[0], chunk_tokens=chunk_tokens)
        buffers = torch.empty(2, size, shard.size, dtype=dtype, device=weight.device)
        parts = []
        for start in range(0, max(hidden.shape[0], 1), size):  # without tokens one empty chunk, for its shapes
            rows = slice(start, start + size)
            logits_nV, scratch_nV = buffers[:, : hidden[rows].shape[0]]
            _multiply(hidden[rows], weight.t(), out=logits_nV)
            ids = (topk_ids_NK[rows], sampled_ids_N[rows])
            merged = _merge(logits_nV, merged_eos_ids, temperature=temperature, shard=shard) if merged_eos_ids else None
            top_ids_nM, top_logits_nM = shard.likeliest(logits_nV, num_top)
            softmax = _softmax(logits_nV, scratch_nV, *ids, temperature=temperature, shard=shard, merged=merged)
            if needs_hidden or needs_weight:
                loss_n, *gradients = _differentiate(token_loss, softmax, rows)
                grad_nV = _grad_logits(softmax, *gradients, temperature=temperature)
                if merged is not None:
                    merged.spread(grad_nV, shard=shard)
                grad_nV = grad_nV.to(weight.dtype)
                if needs_hidden:
                    torch.mm(grad_nV, weight, out=grad_hidden[rows])
                if needs_weight:
                    _add_product(grad_weight, grad_nV.t(), hidden[rows])
            else:
                loss_n = token_loss(softmax.logp_nC, softmax.entropy_n, rows)
            top_logp_nM = (top_logits_nM - top_logits_nM[:, :1]) / temperature - softmax.sum_n.log()[:, None]
            parts.append(
                {
                    "loss_N": loss_n,
                    "student_logp_NC": softmax.logp_nC,
                    "entropy_N": softmax.entropy_n,
                    "argmax_N": softmax.argmax_n,
                    "sampled_logp_N": softmax.sampled_logp_n,
                    "top_ids_NM": top_ids_nM,
                    "top_logp_NM": top_logp_nM,
                }
            )
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shard.all_reduce(outputs["argmax_N"], dist.ReduceOp.MIN)
        loss = outputs["loss_N"].sum()
    if needs_hidden or needs_weight:
        loss = _KnownGradient.apply(hidden_NH, weight_VH, loss, grad_hidden, grad_weight)
    return HeadOutput(loss=loss, **outputs)


@dataclass(frozen=True)
class _Shard:
    """This rank's rows of the head's weight, and what is reduced over all ranks'."""

    first: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight_VH: torch.Tensor, group: dist.ProcessGroup | None) -> _Shard:
        size = weight_VH.shape[0]
        return cls(first=0 if group is None else dist.get_rank(group) * size, size=size, group=group)

    def locate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where token ids stand in this shard (anywhere, if elsewhere), and whether they do."""
        index = ids.long() - self.first
        owned = (index >= 0) & (index < self.size)
        return index.clamp_(0, self.size - 1), owned

    def likeliest(self, logits_nV: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and logits [n, num] of the largest logits of all shards, the largest first. A collective."""
        logits_nM, ids_nM = logits_nV.topk(num)
        ids_nM = ids_nM + self.first
        if self.group is None or num == 0:
            return ids_nM, logits_nM
        of_all = [[torch.empty_like(x) for _ in range(self.group.size())] for x in (logits_nM, ids_nM)]
        dist.all_gather(of_all[0], logits_nM, group=self.group)
        dist.all_gather(of_all[1], ids_nM, group=self.group)
        logits_nM, place_nM = torch.cat(of_all[0], dim=-1).topk(num)
        return torch.cat(of_all[1], dim=-1).gather(1, place_nM), logits_nM

    def all_reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """In place. A collective."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values


@dataclass(frozen=True)
class _Merged:
    """Tokens that were made one class in a chunk's logits, and what they were before. E tokens of the class."""

    ids_E: torch.Tensor
    logits_nE: torch.Tensor
    """At temperature 1."""
    logit_n: torch.Tensor
    """The class's: at `temperature` its exponential is the sum of the tokens'."""
    share_nE: torch.Tensor
    """Of each token in the class."""

    def sampled_logit(self, sampled_ids_n: torch.Tensor, logit_n: torch.Tensor) -> torch.Tensor:
        """The sampled token's own logit, where it is one of the class's; else what is there."""
        is_sampled_nE = sampled_ids_n[:, None] == self.ids_E
        return torch.where(is_sampled_nE.any(-1), (self.logits_nE * is_sampled_nE).sum(-1), logit_n)

    def spread(self, grad_nV: torch.Tensor, *, shard: _Shard) -> None:
        """The class's gradient, given to its tokens by their shares; in place. A collective."""
        index_E, owned_E = shard.locate(self.ids_E)
        grad_n = shard.all_reduce(grad_nV[:, index_E[0]] * owned_E[0], dist.ReduceOp.SUM)
        for member, (index, owned) in enumerate(zip(index_E.tolist(), owned_E.tolist(), strict=True)):
            if owned:
                grad_nV[:, index] = grad_n * self.share_nE[:, member]


def _merge(logits_nV: torch.Tensor, ids: Sequence[int], *, temperature: float, shard: _Shard) -> _Merged:
    """Makes the tokens one class, in place: the first has the class's logit, the others have no probability."""
    ids_E = torch.tensor(ids, device=logits_nV.device)
    index_E, owned_E = shard.locate(ids_E)
    logits_nE = shard.all_reduce(logits_nV[:, index_E].masked_fill(~owned_E, 0.0), dist.ReduceOp.SUM)
    scaled_nE = logits_nE / temperature
    logit_n = temperature * scaled_nE.logsumexp(-1)
    for member, (index, owned) in enumerate(zip(index_E.tolist(), owned_E.tolist(), strict=True)):
        if owned:
            logits_nV[:, index] = logit_n if member == 0 else ABSENT_LOGIT
    return _Merged(ids_E, logits_nE, logit_n, scaled_nE.softmax(-1))


@dataclass(frozen=True)
class _Softmax:
    """What a chunk's logits became, in their own memory, and what the loss needs of them."""

    exp_nV: torch.Tensor
    """exp(logit - the row's largest); 0 at the top-k, which leaves the rest."""
    exp_logit_nV: torch.Tensor
    """That times (logit - the row's largest)."""
    index_nK: torch.Tensor
    owned_nK: torch.Tensor
    """Where the top-k ids stand in this shard, and whether they do."""
    sum_n: torch.Tensor
    """Of all exponentials, over all shards."""
    rest_sum_n: torch.Tensor
    """Of the rest's, over all shards; at least MIN_REST_SUM."""
    logp_nC: torch.Tensor
    entropy_n: torch.Tensor
    argmax_n: torch.Tensor
    """A token id where the largest logit is in this shard, else one beyond any vocabulary."""
    sampled_logp_n: torch.Tensor


def _softmax(
    logits_nV: torch.Tensor,
    scratch_nV: torch.Tensor,
    topk_ids_nK: torch.Tensor,
    sampled_ids_n: torch.Tensor,
    *,
    temperature: float,
    shard: _Shard,
    merged: _Merged | None,
) -> _Softmax:
    """Turns a chunk's logits, at temperature 1, into what loss and gradient need. Overwrites both buffers.

    Two collectives: a MAX of [n] and a SUM of [n, K + 3] (K + 4 where the temperature is not 1).
    """
    local_peak_n, local_argmax_n = logits_nV.max(-1)
    peak_n = shard.all_reduce(local_peak_n.clone(), dist.ReduceOp.MAX)
    argmax_n = torch.where(local_peak_n == peak_n, local_argmax_n + shard.first, torch.iinfo(torch.int64).max)
    logits_nV.sub_(peak_n[:, None])
    index, owned = shard.locate(torch.cat([topk_ids_nK, sampled_ids_n[:, None]], dim=-1))
    index_nK, owned_nK = index[:, :-1], owned[:, :-1]
    picked = [logits_nV.gather(1, index).masked_fill_(~owned, 0.0)]
    if temperature != 1.0:
        picked.append(torch.exp(logits_nV, out=scratch_nV).sum(-1, keepdim=True))
        logits_nV.mul_(1 / temperature)
    exp_nV = torch.exp(logits_nV, out=scratch_nV)
    exp_nV.scatter_add_(1, index_nK, exp_nV.gather(1, index_nK).neg_().masked_fill_(~owned_nK, 0.0))
    exp_logit_nV = logits_nV.mul_(exp_nV)
    sums = torch.cat([exp_nV.sum(-1, keepdim=True), exp_logit_nV.sum(-1, keepdim=True), *picked], dim=-1)
    shard.all_reduce(sums, dist.ReduceOp.SUM)

    num_topk = topk_ids_nK.shape[1]
    rest_sum_n, rest_exp_logit_n, sampled_n = sums[:, 0], sums[:, 1], sums[:, 2 + num_topk]
    if merged is not None:
        sampled_n = merged.sampled_logit(sampled_ids_n, sampled_n + peak_n) - peak_n
        if temperature != 1.0:  # the class's exponential at temperature 1 is not the sum of the tokens'
            sums[:, -1] += (merged.logits_nE - peak_n[:, None]).exp().sum(-1) - (merged.logit_n - peak_n).exp()
    topk_nK = sums[:, 2 : 2 + num_topk] * (1 / temperature)
    padding_nK = topk_ids_nK < 0
    topk_exp_nK = topk_nK.exp().masked_fill_(padding_nK, 0.0)
    sum_n = rest_sum_n + topk_exp_nK.sum(-1)
    log_sum_n = sum_n.log()
    topk_logp_nK = (topk_nK - log_sum_n[:, None]).masked_fill_(padding_nK, PADDING_LOGP)
    rest_sum_n = rest_sum_n.clamp_min(MIN_REST_SUM)
    return _Softmax(
        exp_nV=exp_nV,
        exp_logit_nV=exp_logit_nV,
        index_nK=index_nK,
        owned_nK=owned_nK,
        sum_n=sum_n,
        rest_sum_n=rest_sum_n,
        logp_nC=torch.cat([topk_logp_nK, (rest_sum_n.log() - log_sum_n)[:, None]], dim=-1),
        entropy_n=log_sum_n - (rest_exp_logit_n + (topk_exp_nK * topk_nK).sum(-1)) / sum_n,
        argmax_n=argmax_n,
        sampled_logp_n=sampled_n - (log_sum_n if temperature == 1.0 else sums[:, -1].log()),
    )


def _differentiate(
    token_loss: TokenLoss, softmax: _Softmax, rows: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The chunk's loss [n], and its sum's gradients in the classes' log-probabilities [n, C] and the entropy [n].

    The last is None where the loss does not read the entropy.
    """
    with torch.enable_grad():
        logp_nC, entropy_n = (x.detach().requires_grad_() for x in (softmax.logp_nC, softmax.entropy_n))
        loss_n = token_loss(logp_nC, entropy_n, rows)
        grad_logp_nC, grad_entropy_n = torch.autograd.grad(loss_n.sum(), (logp_nC, entropy_n), allow_unused=True)
    return loss_n.detach(), grad_logp_nC, grad_entropy_n


def _grad_logits(
    softmax: _Softmax, grad_logp_nC: torch.Tensor, grad_entropy_n: torch.Tensor | None, *, temperature: float
) -> torch.Tensor:
    """The gradient in the logits [n, V], made in the softmax's memory. The formula stands at the top of the file."""
    grad_logp_nC = grad_logp_nC / temperature
    grad_nK, grad_rest_n = grad_logp_nC[:, :-1], grad_logp_nC[:, -1]
    logp_nK = softmax.logp_nC[:, :-1]
    total_n = grad_logp_nC.sum(-1)
    grad_nK = grad_nK - logp_nK.exp() * total_n[:, None]
    factor_n = grad_rest_n / softmax.rest_sum_n - total_n / softmax.sum_n
    if grad_entropy_n is None:
        grad_nV = softmax.exp_nV.mul_(factor_n[:, None])
    else:
        share_n = grad_entropy_n / temperature / softmax.sum_n
        factor_n = factor_n - share_n * (softmax.entropy_n - softmax.sum_n.log())
        grad_nV = softmax.exp_nV.mul_(factor_n[:, None])
        grad_nV.addcmul_(softmax.exp_logit_nV, share_n[:, None], value=-1)
        surprise_nK = logp_nK + softmax.entropy_n[:, None]
        grad_nK = grad_nK - (grad_entropy_n / temperature)[:, None] * logp_nK.exp() * surprise_nK
    return grad_nV.scatter_add_(1, softmax.index_nK, grad_nK.masked_fill(~softmax.owned_nK, 0.0))


class _KnownGradient(torch.autograd.Function):
    """Ties a loss to the hidden states and the weight whose gradients were made along with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, loss: torch.Tensor, *known: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dtype, ctx.known = weight_VH.dtype, known
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.known is None:
            raise RuntimeError("the fused head's backward ran twice: its gradients were given away the first time")
        # Given away, not kept: autograd then takes the weight's gradient as it is instead of copying it.
        known, ctx.known = ctx.known, None
        scaled = (None if known_grad is None else known_grad.mul_(grad).to(ctx.dtype) for known_grad in known)
        return *scaled, None, None, None


def _operands(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs, or float32 copies of them where the device has no product from low precision to float32."""
    assert hidden_NH.dtype == weight_VH.dtype, f"hidden states {hidden_NH.dtype}, head {weight_VH.dtype}"
    if weight_VH.is_cuda or weight_VH.dtype.itemsize >= 4:
        return hidden_NH, weight_VH
    return hidden_NH.float(), weight_VH.float()


def _chunk_size(weight_VH: torch.Tensor, *, num_tokens: int, chunk_tokens: int | None) -> int:
    """Tokens at a time: `chunk_tokens`, or what the budget allows, in chunks of about equal size."""
    vocab, hidden = weight_VH.shape
    most = chunk_tokens or max(hidden // 2, MIN_BUFFER_BYTES // (2 * 4 * vocab), 1)
    num_chunks = -(-num_tokens // most) or 1
    return -(-num_tokens // num_chunks) or 1


def _multiply(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """out = a @ b, without rounding to a's dtype in between."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without rounding to a's dtype in between."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for start in range(0, total.shape[0], PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))
