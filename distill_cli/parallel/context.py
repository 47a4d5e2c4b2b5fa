"""Context parallelism: each rank's tokens of a packed row, and the gathering of keys and values.

A row is cut into 2n pieces for n ranks, and rank r has pieces r and 2n - 1 - r: causal attention costs more towards the
end of a sequence, so each rank gets as much of it. Hidden states stay cut all the way through the model. In attention
every rank gathers the keys and values of the whole row (few with grouped queries) for its own queries; in backward
their gradients are summed to their owners in float32. Nothing else changes, and nothing is scaled.

Shape letters: T tokens of the row, t of this rank, G key-value heads, D head size.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.machine.torch_versions import all_gather, reduce_scatter


@dataclass(frozen=True)
class Span:
    """Consecutive queries of the row, and the keys that they may see, which end with them."""

    begin: int
    """First query, among this rank's tokens."""
    keys: tuple[int, int]
    """(begin, end) of the keys in the row."""
    query_bounds: tuple[int, ...]
    """0, then each document's end, counted from the span's first query."""
    key_bounds: tuple[int, ...]
    """0, then each document's end, counted from the span's first key."""


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row of T tokens, and the part of the row that is this rank's."""

    bounds: tuple[int, ...]
    """0, then each document's end in the row; the last is T."""
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    is_rows: bool = False
    """The documents, all of one length, are rows of a batch instead of parts of one row."""

    @property
    def row_span(self) -> Span:
        """The whole of one of the rows."""
        length = self.bounds[1]
        return Span(0, (0, length), (0, length), (0, length))

    def batch(self, x_1T: torch.Tensor) -> torch.Tensor:
        """Return [1, T] as the model takes it: as it is, or as rows [B, T / B]."""
        return x_1T.view(-1, self.bounds[1]) if self.is_rows else x_1T

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Return (begin, end) in the row of a rank's tokens, in their order."""
        if self.size == 1:
            return ((0, self.bounds[-1]),)
        length = self.bounds[-1] // (2 * self.size)
        return tuple((piece * length, (piece + 1) * length) for piece in (rank, 2 * self.size - 1 - rank))

    @cached_property
    def spans(self) -> list[Span]:
        """A span for each of this rank's pieces."""
        spans, begin = [], 0
        for first, last in self.pieces(self.rank):
            visible = [(a, min(b, last)) for a, b in pairwise(self.bounds) if a < last and b > first]
            keys_begin = visible[0][0]
            queries, keys = ((0, *(end - start for _, end in visible)) for start in (first, keys_begin))
            spans.append(Span(begin, (keys_begin, last), query_bounds=queries, key_bounds=keys))
            begin += last - first
        return spans

    def take(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part of a tensor that has the row's T along `dim`."""
        return torch.cat([x.narrow(dim, begin, end - begin) for begin, end in self.pieces(self.rank)], dim)

    def order(self) -> torch.Tensor:
        """Return each token's place in the row, in the order of the ranks' concatenated parts: int64 [T]."""
        ranks = range(self.size)
        return torch.cat([torch.arange(begin, end) for rank in ranks for begin, end in self.pieces(rank)])


def gather_row(x_1GtD: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Gather [1, G, t, D] of each rank to [1, G, T, D] in the row's order. A collective, in backward too."""
    if documents.size == 1:
        return x_1GtD
    return _GatherRow.apply(x_1GtD, documents)


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_1GtD: torch.Tensor, documents: Documents) -> torch.Tensor:
        ctx.documents, ctx.dtype = documents, x_1GtD.dtype
        ctx.order = documents.order().to(x_1GtD.device)
        part = x_1GtD.movedim(2, 0).contiguous()
        gathered = part.new_empty(part.shape[0] * documents.size, *part.shape[1:])
        all_gather(gathered, part, group=documents.group)
        row = torch.empty_like(gathered)
        row[ctx.order] = gathered
        return row.movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, grad_1GTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Summed in float32: the ranks' parts of a key's gradient may cancel.
        grad = grad_1GTD.movedim(2, 0)[ctx.order].to(torch.promote_types(ctx.dtype, torch.float32)).contiguous()
        mine = grad.new_empty(grad.shape[0] // ctx.documents.size, *grad.shape[1:])
        reduce_scatter(mine, grad, group=ctx.documents.group)
        return mine.movedim(0, 2).to(ctx.dtype), None
