"""The fused head: both models' predictions and the loss without keeping the logits.

Tokens pass in chunks. The loss needs little of a chunk's logits: log-probabilities of a few classes
(`class_chunk`), or sums over the vocabulary (`full_chunk`), and so its gradient is known as soon as the logits are: the
chunk's part of the gradients of hidden states and weight is made before its logits are forgotten. Logits are made once,
three matrix products in all, as without fusing, and one for the teacher's if its hidden states are given. (Liger
Kernel's fused linear losses do the same.)

The head's r = h W^T + b become the model's logits z = scale r, or z = cap tanh(scale r / cap) (logit_transform.py).
With y = z / temperature, and dL/dy from the chunk:

    dL/dr_v = dL/dy_v (scale / temperature) (1 - (z_v / cap)^2)          without the last factor if there is no cap

The chunk overwrites its logits, so z / cap is kept in a buffer of its own.

Left out: backward through backward.

Shape letters: N tokens, n tokens of a chunk, H hidden size, V vocabulary (under tensor parallelism this rank's shard),
K ids of the support, C = K + 1 classes: the ids, then the rest; M each model's likeliest (`num_top`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from distill_cli.losses.chunks import chunk_size
from distill_cli.losses.class_chunk import ClassChunk
from distill_cli.losses.full_chunk import FullChunk
from distill_cli.losses.groups import Grouped, RowGroups
from distill_cli.losses.head import Head, Merged, Shard, add_product, logit_dtype, multiply
from distill_cli.losses.own_logits import OwnLogits
from distill_cli.losses.teacher_chunk import TeacherChunk, TeacherHidden, TeacherView, TopK, view_of_topk
from distill_cli.losses.token_loss import TokenLoss, Tokens


@dataclass(frozen=True)
class HeadOutput:
    """The head's results for a micro-batch, at the loss's temperature unless stated otherwise. All but `loss` are
    detached."""

    loss: torch.Tensor
    """Scalar float32: the sum of `loss_N`, differentiable in hidden states, weight and bias."""
    loss_N: torch.Tensor
    """float32 [N], as `TokenLoss.total` returned it."""
    divergence_N: torch.Tensor
    """float32 [N]: the divergence, before weights and everything else in `loss_N`."""
    weight_N: torch.Tensor
    """float32 [N]: the token's weight in the loss, before the one division."""
    kl_forward_N: torch.Tensor
    kl_reverse_N: torch.Tensor
    """float32 [N]: KL(p || q) and KL(q || p) over the support's ids and the rest as one more class."""
    teacher_mass_N: torch.Tensor
    student_mass_N: torch.Tensor
    """float32 [N]: each model's probability of the support's ids."""
    entropy_N: torch.Tensor
    """float32 [N], over the whole vocabulary."""
    argmax_N: torch.Tensor
    """int64 [N]: the likeliest token."""
    sampled_logp_N: torch.Tensor
    """float32 [N], at temperature 1: what the sampler should have reported for its tokens."""
    top_ids_NM: torch.Tensor
    """int64 [N, M]: the student's own `num_top` likeliest tokens, the likeliest first."""
    top_logp_NM: torch.Tensor
    """float32 [N, M]"""
    teacher_argmax_N: torch.Tensor
    """int64 [N]"""
    teacher_sampled_logp_N: torch.Tensor
    """float32 [N]: of the sampled token."""
    teacher_entropy_N: torch.Tensor
    """float32 [N]; see `Tokens.teacher_entropy_n`."""
    teachability_N: torch.Tensor
    """float32 [N]: see `Tokens.teachability_n`; [N, 0] without `num_top`, unless the loss reads it."""
    residue_N: torch.Tensor
    """float32 [N]: see `TeacherView.residue_n`; 0 without it."""
    teacher_top_ids_NM: torch.Tensor
    """int64 [N, M]: the teacher's likeliest tokens; padded with PADDING_ID where fewer are known."""
    teacher_top_logp_NM: torch.Tensor
    """float32 [N, M]"""
    teacher_logp_NC: torch.Tensor
    student_logp_NC: torch.Tensor
    """float32 [N, K + 1]: of the support's ids, then of the rest. [N, 0] without `with_classes`, or with full
    support."""


def join(outputs: Sequence[HeadOutput], rows: Sequence[torch.Tensor]) -> HeadOutput:
    """Return the results for all tokens, given those for the tokens at `rows`, which together are all rows once.

    Classes of several supports are padded to the widest.
    """
    order_N = torch.cat(list(rows)).argsort()
    loss, *parts = zip(*(vars(output).values() for output in outputs), strict=True)
    return HeadOutput(torch.stack(loss).sum(), *(_cat(part)[order_N] for part in parts))


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0), value=-1e4) for part in parts]
    return torch.cat(list(parts))


def linear_divergence(
    hidden_NH: torch.Tensor,
    head: Head,
    teacher: TopK | TeacherHidden,
    token_loss: TokenLoss,
    *,
    sampled_ids_N: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    num_top: int = 0,
    with_classes: bool = False,
    merged_eos_ids: Sequence[int] = (),
) -> HeadOutput:
    """Return the sum over tokens of `token_loss`, for a student with logits transform(h W^T + b) / temperature.

    Logits and all that follows are float32 whatever the inputs are (float64 of float64 inputs). GPUs multiply
    low-precision inputs as they are and accumulate in float32; elsewhere they are copied to float32 for the call. If
    an input requires a gradient, it is computed here; backward, which can run once, scales it by that of `loss`.

    Args:
        hidden_NH: [N, H]; replicated over `group`.
        head: the student's, of hidden_NH's dtype.
        teacher: its top-k, or its hidden states with its head, which share `group` with the student's.
        token_loss: called once per chunk, in order. It carries the tokens' weights and the one division.
        sampled_ids_N: int [N].
        group: the tensor-parallel ranks, all of which must call with the same tokens. Only [n, K + 4] and smaller
            cross ranks, and of a teacher with other tokens the whole [n, V]. Outputs are equal on all of them. Hidden's
            gradient is partial: sum it over `group`. Those of weight and bias are this shard's, and whole.
        chunk_tokens: tokens at a time, at most; changes results by rounding only. None: see `chunk_size`.
        num_top: number of both models' likeliest tokens to return: one more pass over the logits, which training does
            not need.
        with_classes: return the support's log-probabilities too, which training does not need either.
        merged_eos_ids: tokens that are one class under the first one's id, whose probability is the sum of theirs.
            A `TopK` must not have the other ids. Costs two more collectives of [n] and [n, len(merged_eos_ids)].
    """
    inputs = hidden_NH, head.weight_VH, head.bias_V
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    with torch.no_grad():
        chunks = _Chunks(hidden_NH, head, teacher, token_loss, sampled_ids_N, temperature, group, tuple(merged_eos_ids))
        grads = _Gradients.like(*chunks.operands, needs=needs) if any(needs) else None
        parts = list(chunks.run(grads, most=chunk_tokens, num_top=num_top, with_classes=with_classes))
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss = outputs["loss_N"].sum()
    if grads is not None:
        loss = _KnownGradient.apply(*inputs, loss, grads.hidden_NH, grads.weight_VH, grads.bias_V)
    output = HeadOutput(loss, **outputs)
    chunks.shard.all_reduce(output.argmax_N, dist.ReduceOp.MIN)
    if isinstance(teacher, TeacherHidden):
        chunks.shard.all_reduce(output.teacher_argmax_N, dist.ReduceOp.MIN)
    return output


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the head's inputs, filled chunk by chunk; None for an input that requires none."""

    hidden_NH: torch.Tensor | None
    weight_VH: torch.Tensor | None
    bias_V: torch.Tensor | None

    @classmethod
    def like(
        cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, needs: Sequence[bool]
    ) -> _Gradients:
        return cls(
            torch.empty_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=logit_dtype(weight)) if needs[1] else None,
            torch.zeros_like(bias) if bias is not None and needs[2] else None,
        )

    def add(self, grad_nV: torch.Tensor, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, rows: slice) -> None:
        """Add a chunk's, given that of the head's product at its rows."""
        if self.bias_V is not None:
            self.bias_V.add_(grad_nV.sum(0))
        grad_nV = grad_nV.to(weight_VH.dtype)
        if self.hidden_NH is not None:
            torch.mm(grad_nV, weight_VH, out=self.hidden_NH[rows])
        if self.weight_VH is not None:
            add_product(self.weight_VH, grad_nV.t(), hidden_NH[rows])


class _Chunks:
    """The chunks of one call; the arguments are those of `linear_divergence`."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        head: Head,
        teacher: TopK | TeacherHidden,
        token_loss: TokenLoss,
        sampled_ids_N: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        merged_eos_ids: tuple[int, ...],
    ) -> None:
        self.operands = head.operands(hidden_NH)
        self.shard = Shard(head.weight_VH.shape[0], group, temperature)
        self._transform, self._teacher, self._token_loss = head.transform, teacher, token_loss
        self._sampled_ids_N, self._merged_eos_ids = sampled_ids_N, merged_eos_ids
        self._of_teacher = None
        self._own: OwnLogits | None = None
        if isinstance(teacher, TeacherHidden):
            self._of_teacher = teacher.head.operands(teacher.hidden_NH)

    def run(
        self, grads: _Gradients | None, *, most: int | None, num_top: int, with_classes: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield each chunk's results by the names of `HeadOutput`'s fields, and add its gradients."""
        hidden, weight, bias = self.operands
        size = chunk_size(*weight.shape, num_tokens=hidden.shape[0], most=most)
        keeps_tanh = self._transform.soft_cap is not None and grads is not None
        has_logits = isinstance(self._teacher, TeacherHidden) and self._teacher.own is None
        num_buffers = 2 + keeps_tanh + has_logits
        if isinstance(self._teacher, TeacherHidden) and (own := self._teacher.own) is not None:
            assert self._of_teacher is not None
            of_own: dict[str, Any] = {"shard": self.shard, "num_tokens": size}
            self._own = OwnLogits(own.text, self._teacher.head, own.head, self._of_teacher, **of_own)
        shape = num_buffers, size, self.shard.size
        buffers = torch.empty(shape, dtype=logit_dtype(weight), device=weight.device)
        for start in range(0, max(hidden.shape[0], 1), size):  # without tokens one empty chunk, for its shapes
            rows = slice(start, start + size)
            logits_nV, scratch_nV, *others = buffers[:, : hidden[rows].shape[0]]
            tanh_nV = others.pop() if keeps_tanh else scratch_nV  # no gradient reads it there
            multiply(hidden[rows], weight.t(), out=logits_nV)
            self._transform.apply(logits_nV, bias_V=bias, tanh_nV=tanh_nV)
            with_gradient, sampled_ids_n = grads is not None, self._sampled_ids_N[rows]
            groups = None if (found := self._teacher.groups) is None else found.take(rows, len(logits_nV))
            grouped = None if groups is None else Grouped(logits_nV, groups, sampled_ids_n, shard=self.shard)
            merged = Merged(logits_nV, self._merged_eos_ids, shard=self.shard) if self._merged_eos_ids else None
            top_ids_nM, top_logits_nM = self.shard.likeliest(logits_nV, num_top)
            options: dict[str, Any] = {"rows": rows, "num_top": num_top, "groups": groups}
            class_ids_n = sampled_ids_n if grouped is None else grouped.class_ids_n
            view, teacher = self._see_teacher(logits_nV, scratch_nV, others, class_ids_n, **options)
            chunk: ClassChunk | FullChunk
            shared: dict[str, Any] = {"shard": self.shard, "merged": merged, "grouped": grouped}
            if teacher is not None and teacher.is_full:
                shared |= {"terms": self._token_loss.terms, "with_gradient": with_gradient}
                chunk = FullChunk(logits_nV, teacher, sampled_ids_n, **shared)
            else:
                chunk = ClassChunk(logits_nV, scratch_nV, view, sampled_ids_n, **shared)
            results, grad_nV = self._lose(chunk, view, rows, with_gradient=with_gradient)
            if grads is not None:
                self._transform.cap_gradient(grad_nV, tanh_nV=tanh_nV)
                grads.add(grad_nV, hidden, weight, rows=rows)
            results |= {"top_ids_NM": top_ids_nM, "top_logp_NM": chunk.logp_of(top_logits_nM)}
            classes = ("teacher_logp_NC", "student_logp_NC")
            yield results if with_classes else results | {name: results[name][:, :0] for name in classes}

    def _see_teacher(
        self,
        logits_nV: torch.Tensor,
        scratch_nV: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        class_ids_n: torch.Tensor,
        *,
        rows: slice,
        num_top: int,
        groups: RowGroups | None,
    ) -> tuple[TeacherView, TeacherChunk | None]:
        """Return the teacher's predictions, and its chunk if its hidden states are given. Collectives.

        Args:
            logits_nV: the student's, which are only read.
            buffers: one for the teacher's logits, if its hidden states are given.
            class_ids_n: the sampled tokens, or those that stand for them.
            groups: of these rows.
        """
        options: dict[str, Any] = {"num_top": num_top}
        options["teachability"] = self._token_loss.reads_teachability or num_top > 0
        if isinstance(self._teacher, TopK):
            return view_of_topk(self._teacher, rows, logits_nV, shard=self.shard, **options), None
        assert self._of_teacher is not None
        if self._own is not None:
            probs_nV, merged = self._own.probabilities(rows, groups), self._merged_eos_ids
            chunk = TeacherChunk.of_probabilities(probs_nV, self._teacher, shard=self.shard, merged_eos_ids=merged)
            return chunk.view(logits_nV, class_ids_n, **options), chunk
        chunk = TeacherChunk(
            self._teacher,
            self._of_teacher,
            rows,
            buffer_nV=buffers[0],
            scratch_nV=scratch_nV,
            shard=self.shard,
            merged_eos_ids=self._merged_eos_ids,
        )
        return chunk.view(logits_nV, class_ids_n, **options), chunk

    def _lose(
        self, chunk: ClassChunk | FullChunk, view: TeacherView, rows: slice, *, with_gradient: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the loss with what is reported of it, and its gradient in the logits before the cap, if it has one."""
        tokens = Tokens(
            entropy_n=chunk.entropy_n,
            sampled_logp_n=chunk.sampled_logp_n,
            class_logp_n=chunk.class_logp_n,
            teacher_sampled_logp_n=view.sampled_logp_n,
            teacher_entropy_n=view.entropy_n,
            teachability_n=view.teachability_n,
        )
        if with_gradient:
            *values, grad_nV = chunk.differentiate(self._token_loss, tokens, rows, scale=self._transform.scale)
        else:
            values, grad_nV = list(chunk.evaluate(self._token_loss, tokens, rows)), chunk.entropy_n[:0]
        divergence_n, weights_n, loss_n = values
        return chunk.compare() | {
            "loss_N": loss_n,
            "divergence_N": divergence_n,
            "weight_N": weights_n,
            "entropy_N": chunk.entropy_n,
            "argmax_N": chunk.argmax_n,
            "sampled_logp_N": chunk.sampled_logp_n,
            "teacher_argmax_N": view.argmax_n,
            "teacher_sampled_logp_N": view.sampled_logp_n,
            "teacher_entropy_N": view.entropy_n,
            "teachability_N": loss_n.new_empty(len(loss_n), 0) if view.teachability_n is None else view.teachability_n,
            "residue_N": torch.zeros_like(loss_n) if view.residue_n is None else view.residue_n,
            "teacher_top_ids_NM": view.top_ids_nM,
            "teacher_top_logp_NM": view.top_logp_nM,
        }, grad_nV


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
