"""A model's head over the vocabulary, whole or this rank's shard of it, and the products that it is multiplied by.

Shape letters: N tokens, n tokens of a chunk, H hidden size, V vocabulary (under tensor parallelism this rank's shard),
M likeliest tokens, E merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distill_cli.losses.logit_transform import IDENTITY, LogitTransform

ABSENT_LOGIT = -1e30
"""Logit of a token that the model cannot give or that was merged into another: its exponential is 0, and so is their
product."""
PRODUCT_ROWS = 2**14
"""Rows of the weight's gradient that a low-precision product is added to at a time."""


@dataclass(frozen=True)
class Head:
    """What makes a model's logits of its hidden states: transform(h W^T + b)."""

    weight_VH: torch.Tensor
    """[V, H]; a rank's shard has the rows of an even split of the vocabulary, in the order of ranks."""
    bias_V: torch.Tensor | None = None
    """[V], of the weight's dtype and split like the weight; added in the logits' dtype."""
    transform: LogitTransform = IDENTITY
    """The model's scale and cap of its logits."""

    def operands(self, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return hidden states, weight and bias to multiply: float32 copies if the device has no product from low
        precision to float32. The bias has the logits' dtype."""
        weight_VH = self.weight_VH
        assert hidden_NH.dtype == weight_VH.dtype, f"hidden states {hidden_NH.dtype}, head {weight_VH.dtype}"
        assert self.bias_V is None or self.bias_V.dtype == weight_VH.dtype, f"bias {self.bias_V.dtype}"
        if not weight_VH.is_cuda and weight_VH.dtype.itemsize < 4:
            hidden_NH, weight_VH = hidden_NH.float(), weight_VH.float()
        bias_V = self.bias_V
        return hidden_NH, weight_VH, None if bias_V is None else bias_V.to(logit_dtype(weight_VH))


def logit_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of the logits: float32, or float64 of a float64 head."""
    return torch.promote_types(weight.dtype, torch.float32)


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that this rank has, and what is reduced over all ranks'."""

    size: int
    """V: ids per rank."""
    group: dist.ProcessGroup | None
    temperature: float

    @property
    def first(self) -> int:
        """The first id of this rank's."""
        return 0 if self.group is None else dist.get_rank(self.group) * self.size

    @property
    def total(self) -> int:
        """Ids of all ranks."""
        return self.size if self.group is None else self.size * self.group.size()

    def locate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places of token ids in this shard (any place for others), and whether they are in it."""
        index = ids.long() - self.first
        owned = (index >= 0) & (index < self.size)
        return index.clamp_(0, self.size - 1), owned

    def likeliest(self, logits_nV: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and logits [n, num] of the largest logits of all shards, the largest first. A collective.

        Args:
            logits_nV: may lack the shard's last ids.
            num: at most the vocabulary.
        """
        logits_nM, ids_nM = logits_nV.topk(min(num, logits_nV.shape[1]))
        ids_nM = ids_nM + self.first
        if self.group is None or num == 0:
            return ids_nM, logits_nM
        if (lacking := min(num, self.size) - logits_nM.shape[1]) > 0:
            logits_nM = torch.nn.functional.pad(logits_nM, (0, lacking), value=ABSENT_LOGIT)
            ids_nM = torch.nn.functional.pad(ids_nM, (0, lacking), value=-1)
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


class Merged:
    """Tokens made one class in a chunk's logits, in place: the first gets the class's logit, the others none."""

    def __init__(self, logits_nV: torch.Tensor, ids: Sequence[int], *, shard: Shard) -> None:
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

    def has(self, ids: torch.Tensor) -> torch.Tensor:
        """Return whether ids are merged tokens."""
        return (ids[..., None] == self.ids_E).any(-1)

    def sampled_logit(self, sampled_ids_n: torch.Tensor, logit_n: torch.Tensor) -> torch.Tensor:
        """Return the sampled token's own logit if it is one of the class's, else `logit_n`."""
        is_sampled_nE = sampled_ids_n[:, None] == self.ids_E
        return torch.where(is_sampled_nE.any(-1), (self.logits_nE * is_sampled_nE).sum(-1), logit_n)

    def spread(self, grad_nV: torch.Tensor) -> None:
        """Give the class's gradient to its tokens by their shares, in place. A collective."""
        grad_n = self.shard.all_reduce(grad_nV[:, self.first] * self.owns_first, dist.ReduceOp.SUM)
        for member, index in self.places:
            grad_nV[:, index] = grad_n * self.share_nE[:, member]


def multiply(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Compute out = a @ b without rounding to a's dtype in between."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total` without rounding to a's dtype in between."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for start in range(0, total.shape[0], PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))
