"""The fused head: top-k log-probabilities and the loss without keeping the logits.

Tokens pass in chunks. The loss needs only the student's log-probabilities of K + 1 classes (the top-k, and the rest of
the vocabulary together) and its entropy, and so its gradient is known as soon as a chunk's logits are: the chunk's part
of the gradients of hidden states and weight is made before its logits are forgotten. Logits are made once, three matrix
products in all, as without fusing. (Liger Kernel's fused linear losses do the same.)

The head's r = h W^T + b become the model's logits z = scale r, or z = cap tanh(scale r / cap) (logit_transform.py).
With y = z / temperature, q = softmax(y), g = dL/dlogq of a class, G = sum g over the classes, entropy E, g_E = dL/dE:

    dL/dy_v = g_v                   - q_v G - g_E q_v (log q_v + E)      for v in the top-k
    dL/dy_v = q_v (g_rest / q_rest) - q_v G - g_E q_v (log q_v + E)      for all others
    dL/dr_v = dL/dy_v (scale / temperature) (1 - (z_v / cap)^2)          without the last factor if there is no cap

The rest's mass is a sum of its own, not 1 - sum q: precise to float32's relative rounding however small it is. The
chunk overwrites its logits, so z / cap is kept in a buffer of its own.

Left out: backward through backward.

Shape letters: N tokens, n tokens of a chunk, H hidden size, V vocabulary (under tensor parallelism this rank's shard),
K the teacher's top-k, C = K + 1 classes: the top-k, then the rest; M the student's own likeliest (`num_top`); E merged
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from distill_cli.losses.chunks import chunk_size
from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.logit_transform import IDENTITY, LogitTransform

TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""(student_logp_nC, student_entropy_n, rows) -> [n], already weighted; `rows` are the chunk's among all N. It must read
the log-probabilities; reading the entropy too costs one more pass over the chunk."""

MIN_REST_SUM = 1e-30
"""The least sum of the rest's exponentials, where the likeliest token's is 1: log q_rest stays above -70 - log(sum of
all), and g_rest / q_rest stays finite."""
ABSENT_LOGIT = -1e30
"""Logit of a token that was merged into another: its exponential is 0, and so is their product."""
PRODUCT_ROWS = 2**14
"""Rows of the weight's gradient that a low-precision product is added to at a time."""


@dataclass(frozen=True)
class HeadOutput:
    """The head's results for a micro-batch. All but `loss` are detached."""

    loss: torch.Tensor
    """Scalar float32: the sum of `loss_N`, differentiable in hidden states, weight and bias."""
    loss_N: torch.Tensor
    """float32 [N], as `token_loss` returned it."""
    student_logp_NC: torch.Tensor
    """float32 [N, K + 1], at `temperature`: of the top-k ids, then of the rest."""
    entropy_N: torch.Tensor
    """float32 [N], over the whole vocabulary, at `temperature`."""
    argmax_N: torch.Tensor
    """int64 [N]: the likeliest token."""
    sampled_logp_N: torch.Tensor
    """float32 [N], at temperature 1: what the sampler should have reported for its tokens."""
    top_ids_NM: torch.Tensor
    """int64 [N, M]: the student's own `num_top` likeliest tokens, the likeliest first."""
    top_logp_NM: torch.Tensor
    """float32 [N, M], at `temperature`."""


def join(outputs: Sequence[HeadOutput], rows: Sequence[torch.Tensor]) -> HeadOutput:
    """Return the results for all tokens, given those for the tokens at `rows`, which together are all rows once."""
    order_N = torch.cat(list(rows)).argsort()
    loss, *parts = zip(*(vars(output).values() for output in outputs), strict=True)
    return HeadOutput(torch.stack(loss).sum(), *(torch.cat(part)[order_N] for part in parts))


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
    bias_V: torch.Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> HeadOutput:
    """Return the sum over tokens of `token_loss`, for the student with logits transform(h W^T + b) / temperature.

    Logits and all that follows are float32 whatever the inputs are (float64 of float64 inputs). GPUs multiply
    low-precision inputs as they are and accumulate in float32; elsewhere they are copied to float32 for the call. If
    an input requires a gradient, it is computed here; backward, which can run once, scales it by that of `loss`.

    Args:
        hidden_NH: [N, H]; replicated over `group`.
        weight_VH: [V, H], of hidden_NH's dtype; with `group` this rank's part of an even split of the vocabulary, in
            the order of ranks.
        topk_ids_NK: int [N, K], distinct within a row. An id below 0 is padding: it counts neither for the top-k nor
            for the rest, and gets PADDING_LOGP, which the teacher must have there too.
        token_loss: called once per chunk, in order. It carries the tokens' weights and the one division.
        sampled_ids_N: int [N].
        group: the tensor-parallel ranks, all of which must call with the same tokens. Only [n, K + 4] and smaller
            cross ranks. Outputs are equal on all of them. Hidden's gradient is partial: sum it over `group`. Those of
            weight and bias are this shard's, and whole.
        chunk_tokens: tokens at a time, at most; changes results by rounding only. None: see `chunk_size`.
        num_top: number of the student's own likeliest tokens to return: one more pass over the logits, which training
            does not need. At most a shard's vocabulary.
        merged_eos_ids: tokens that are one class under the first one's id, whose probability is the sum of theirs.
            The other ids must not be among the top-k. Costs two more collectives of [n] and [n, len(merged_eos_ids)].
        bias_V: [V], of the weight's dtype and split like the weight; added in the logits' dtype.
        transform: the model's scale and cap of its logits. Training through a cap needs a third buffer [n, V].
    """
    needs_hidden, needs_weight, needs_bias = (
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_NH, weight_VH, bias_V)
    )
    needs_gradient = needs_hidden or needs_weight or needs_bias
    with torch.no_grad():
        hidden, weight = _operands(hidden_NH, weight_VH)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        assert bias_V is None or bias_V.dtype == weight_VH.dtype, f"bias {bias_V.dtype}, head {weight_VH.dtype}"
        bias = None if bias_V is None else bias_V.to(dtype)
        shard = _Shard(weight.shape[0], group, temperature)
        grads = _Gradients(
            torch.empty_like(hidden) if needs_hidden else None,
            torch.zeros_like(weight, dtype=dtype) if needs_weight else None,
            torch.zeros_like(bias) if bias is not None and needs_bias else None,
        )
        size = chunk_size(*weight.shape, num_tokens=hidden.shape[0], most=chunk_tokens)
        num_buffers = 3 if transform.soft_cap is not None and needs_gradient else 2
        buffers = torch.empty(num_buffers, size, shard.size, dtype=dtype, device=weight.device)
        parts = []
        for start in range(0, max(hidden.shape[0], 1), size):  # without tokens one empty chunk, for its shapes
            rows = slice(start, start + size)
            logits_nV, scratch_nV, *kept = buffers[:, : hidden[rows].shape[0]]
            tanh_nV = kept[0] if kept else scratch_nV  # no gradient reads it there
            _multiply(hidden[rows], weight.t(), out=logits_nV)
            transform.apply(logits_nV, bias_V=bias, tanh_nV=tanh_nV)
            merged = _Merged(logits_nV, merged_eos_ids, shard=shard) if merged_eos_ids else None
            top_ids_nM, top_logits_nM = shard.likeliest(logits_nV, num_top)
            chunk = _Chunk(logits_nV, scratch_nV, topk_ids_NK[rows], sampled_ids_N[rows], shard=shard, merged=merged)
            if needs_gradient:
                loss_n, grad_nV = chunk.differentiate(token_loss, rows, transform=transform, tanh_nV=tanh_nV)
                grads.add(grad_nV, hidden, weight, rows=rows)
            else:
                loss_n = token_loss(chunk.logp_nC, chunk.entropy_n, rows)
            top_logp_nM = (top_logits_nM - top_logits_nM[:, :1]) / temperature - chunk.sum_n.log()[:, None]
            head = (chunk.logp_nC, chunk.entropy_n, chunk.argmax_n, chunk.sampled_logp_n)
            parts.append((loss_n, *head, top_ids_nM, top_logp_nM))
        outputs = [torch.cat(part) for part in zip(*parts, strict=True)]
        loss = outputs[0].sum()
    if needs_gradient:
        loss = _KnownGradient.apply(hidden_NH, weight_VH, bias_V, loss, grads.hidden_NH, grads.weight_VH, grads.bias_V)
    output = HeadOutput(loss, *outputs)
    shard.all_reduce(output.argmax_N, dist.ReduceOp.MIN)
    return output


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the head's inputs, filled chunk by chunk; None for an input that requires none."""

    hidden_NH: torch.Tensor | None
    weight_VH: torch.Tensor | None
    bias_V: torch.Tensor | None

    def add(self, grad_nV: torch.Tensor, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, rows: slice) -> None:
        """Add a chunk's, given that of the head's product at its rows."""
        if self.bias_V is not None:
            self.bias_V.add_(grad_nV.sum(0))
        grad_nV = grad_nV.to(weight_VH.dtype)
        if self.hidden_NH is not None:
            torch.mm(grad_nV, weight_VH, out=self.hidden_NH[rows])
        if self.weight_VH is not None:
            _add_product(self.weight_VH, grad_nV.t(), hidden_NH[rows])


@dataclass(frozen=True)
class _Shard:
    """This rank's rows of the head's weight, and what is reduced over all ranks'."""

    size: int
    group: dist.ProcessGroup | None
    temperature: float

    @property
    def first(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group) * self.size

    def locate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places of token ids in this shard (any place for others), and whether they are in it."""
        index = ids.long() - self.first
        owned = (index >= 0) & (index < self.size)
        return index.clamp_(0, self.size - 1), owned

    def likeliest(self, logits_nV: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and logits [n, num] of the largest logits of all shards, the largest first. A collective."""
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
        """Reduce in place. A collective."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values


class _Merged:
    """Tokens made one class in a chunk's logits, in place: the first gets the class's logit, the others none."""

    def __init__(self, logits_nV: torch.Tensor, ids: Sequence[int], *, shard: _Shard) -> None:
        """Merge `ids`. A collective."""
        self.shard, self.ids_E = shard, torch.tensor(ids, device=logits_nV.device)
        index_E, owned_E = shard.locate(self.ids_E)
        self.first, self.owns_first = index_E[0], owned_E[0]
        places = enumerate(token - shard.first for token in ids)
        self.places = [(member, index) for member, index in places if 0 <= index < shard.size]
        # At temperature 1.
        self.logits_nE = shard.all_reduce(logits_nV[:, index_E].masked_fill(~owned_E, 0.0), dist.ReduceOp.SUM)
        scaled_nE = self.logits_nE / shard.temperature
        # At the temperature, its exponential is the sum of the tokens'.
        self.logit_n = shard.temperature * scaled_nE.logsumexp(-1)
        self.share_nE = scaled_nE.softmax(-1)  # of each token in the class
        for member, index in self.places:
            logits_nV[:, index] = self.logit_n if member == 0 else ABSENT_LOGIT

    def sampled_logit(self, sampled_ids_n: torch.Tensor, logit_n: torch.Tensor) -> torch.Tensor:
        """Return the sampled token's own logit if it is one of the class's, else `logit_n`."""
        is_sampled_nE = sampled_ids_n[:, None] == self.ids_E
        return torch.where(is_sampled_nE.any(-1), (self.logits_nE * is_sampled_nE).sum(-1), logit_n)

    def spread(self, grad_nV: torch.Tensor) -> None:
        """Give the class's gradient to its tokens by their shares, in place. A collective."""
        grad_n = self.shard.all_reduce(grad_nV[:, self.first] * self.owns_first, dist.ReduceOp.SUM)
        for member, index in self.places:
            grad_nV[:, index] = grad_n * self.share_nE[:, member]


class _Chunk:
    """A chunk's logits, turned in their own memory into what loss and gradient need."""

    def __init__(
        self,
        logits_nV: torch.Tensor,
        scratch_nV: torch.Tensor,
        topk_ids_nK: torch.Tensor,
        sampled_ids_n: torch.Tensor,
        *,
        shard: _Shard,
        merged: _Merged | None,
    ) -> None:
        """Take logits at temperature 1, and overwrite both buffers.

        Two collectives: a MAX of [n] and a SUM of [n, K + 3] (K + 4 if the temperature is not 1).
        """
        self.temperature, self.merged = shard.temperature, merged
        is_scaled = shard.temperature != 1.0
        local_peak_n, local_argmax_n = logits_nV.max(-1)
        peak_n = shard.all_reduce(local_peak_n.clone(), dist.ReduceOp.MAX)
        # A token id if the largest logit is in this shard, else one beyond any vocabulary.
        self.argmax_n = torch.where(local_peak_n == peak_n, local_argmax_n + shard.first, torch.iinfo(torch.int64).max)
        logits_nV.sub_(peak_n[:, None])
        index, owned = shard.locate(torch.cat([topk_ids_nK, sampled_ids_n[:, None]], dim=-1))
        self.index_nK, self.owned_nK = index[:, :-1], owned[:, :-1]
        picked = [logits_nV.gather(1, index).masked_fill_(~owned, 0.0)]
        if is_scaled:
            picked.append(torch.exp(logits_nV, out=scratch_nV).sum(-1, keepdim=True))
            logits_nV.mul_(1 / self.temperature)
        # exp(logit - the row's largest), 0 at the top-k, which leaves the rest; and that times the same difference.
        exp_nV = self.exp_nV = torch.exp(logits_nV, out=scratch_nV)
        exp_nV.scatter_add_(1, self.index_nK, exp_nV.gather(1, self.index_nK).neg_().masked_fill_(~self.owned_nK, 0.0))
        self.exp_logit_nV = logits_nV.mul_(exp_nV)
        sums = torch.cat([exp_nV.sum(-1, keepdim=True), self.exp_logit_nV.sum(-1, keepdim=True), *picked], dim=-1)
        shard.all_reduce(sums, dist.ReduceOp.SUM)

        num_topk = topk_ids_nK.shape[1]
        rest_sum_n, rest_exp_logit_n, sampled_n = sums[:, 0], sums[:, 1], sums[:, 2 + num_topk]
        if merged is not None:
            sampled_n = merged.sampled_logit(sampled_ids_n, sampled_n + peak_n) - peak_n
            if is_scaled:  # the class's exponential at temperature 1 is not the sum of the tokens'
                sums[:, -1] += (merged.logits_nE - peak_n[:, None]).exp().sum(-1) - (merged.logit_n - peak_n).exp()
        topk_nK = sums[:, 2 : 2 + num_topk] * (1 / self.temperature)
        padding_nK = topk_ids_nK < 0
        topk_exp_nK = topk_nK.exp().masked_fill_(padding_nK, 0.0)
        self.sum_n = rest_sum_n + topk_exp_nK.sum(-1)  # of all exponentials, over all shards
        log_sum_n = self.sum_n.log()
        topk_logp_nK = (topk_nK - log_sum_n[:, None]).masked_fill_(padding_nK, PADDING_LOGP)
        self.rest_sum_n = rest_sum_n.clamp_min(MIN_REST_SUM)
        self.logp_nC = torch.cat([topk_logp_nK, (self.rest_sum_n.log() - log_sum_n)[:, None]], dim=-1)
        self.entropy_n = log_sum_n - (rest_exp_logit_n + (topk_exp_nK * topk_nK).sum(-1)) / self.sum_n
        self.sampled_logp_n = sampled_n - (sums[:, -1].log() if is_scaled else log_sum_n)

    def differentiate(
        self, token_loss: TokenLoss, rows: slice, *, transform: LogitTransform, tanh_nV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss [n], and its sum's gradient in h W^T + b [n, V], made in the logits' memory.

        The formula stands at the top of the file. A collective if tokens are merged.

        Args:
            tanh_nV: z / cap, as `transform.apply` left it; read only if there is a cap.
        """
        divisor = self.temperature / transform.scale  # of [n, C]: the scale's derivative costs no pass over [n, V]
        with torch.enable_grad():
            logp_nC, entropy_n = (x.detach().requires_grad_() for x in (self.logp_nC, self.entropy_n))
            loss_n = token_loss(logp_nC, entropy_n, rows)
            grads = torch.autograd.grad(loss_n.sum(), (logp_nC, entropy_n), allow_unused=True)
        grad_logp_nC = grads[0] / divisor
        grad_nK, grad_rest_n = grad_logp_nC[:, :-1], grad_logp_nC[:, -1]
        logp_nK = self.logp_nC[:, :-1]
        total_n = grad_logp_nC.sum(-1)
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
        transform.cap_gradient(grad_nV, tanh_nV=tanh_nV)
        return loss_n.detach(), grad_nV


class _KnownGradient(torch.autograd.Function):
    """Tie a loss to the hidden states, the weight and the bias whose gradients were computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        loss: torch.Tensor,
        *known: torch.Tensor | None,
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
        return *scaled, None, None, None, None


def _operands(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs, or float32 copies if the device has no product from low precision to float32."""
    assert hidden_NH.dtype == weight_VH.dtype, f"hidden states {hidden_NH.dtype}, head {weight_VH.dtype}"
    if weight_VH.is_cuda or weight_VH.dtype.itemsize >= 4:
        return hidden_NH, weight_VH
    return hidden_NH.float(), weight_VH.float()


def _multiply(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Compute out = a @ b without rounding to a's dtype in between."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total` without rounding to a's dtype in between."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for start in range(0, total.shape[0], PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))
