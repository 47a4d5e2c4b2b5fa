"""Sums over the vocabulary at each token of a chunk, without another tensor of its logits' size.

Rows pass in blocks: on CPUs of a size at which an operator's result is still in the processor's cache when the next one
reads it; on GPUs all at once, compiled into few passes over the logits.

Shape letters: n tokens, b tokens of a block, V vocabulary (under tensor parallelism this rank's shard).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.losses.head import Shard

BLOCK_ELEMENTS = 2**18
"""Logits of a block on a CPU."""


def by_blocks(
    function: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor, **options: Any
) -> list[torch.Tensor]:
    """Return `function` of tensors with the same rows, computed block by block; its results have these rows too.

    Args:
        options: passed on to each call.
    """
    num_tokens, num_logits = rows[0].shape
    if rows[0].is_cuda:
        return list(_compiled(function)(*rows, **options))
    size = max(1, BLOCK_ELEMENTS // max(num_logits, 1))
    starts = range(0, max(num_tokens, 1), size)  # without tokens one empty block, for its shapes
    blocks = [function(*(one[start : start + size] for one in rows), **options) for start in starts]
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True)
class Softmax:
    """A softmax over the vocabulary of all shards, at the temperature unless stated otherwise; [n] each."""

    log_sum_n: torch.Tensor
    """log sum_v exp(z_v / temperature)"""
    log_sum_at_one_n: torch.Tensor
    """log sum_v exp(z_v)"""
    entropy_n: torch.Tensor
    argmax_n: torch.Tensor
    """int64: the largest logit's id if it is in this shard, else one beyond any vocabulary: reduce it with MIN."""

    @classmethod
    def of(cls, logits_nV: torch.Tensor, shard: Shard) -> Softmax:
        """Two collectives: a MAX of [n] and a SUM of [n, 3]."""
        values_n4, place_n = by_blocks(row_sums, logits_nV, temperature=shard.temperature)
        local_peak_n, *sums = values_n4.unbind(-1)
        peak_n = shard.all_reduce(local_peak_n.clone(), dist.ReduceOp.MAX)
        argmax_n = torch.where(local_peak_n == peak_n, place_n + shard.first, torch.iinfo(torch.int64).max)
        below_n = local_peak_n - peak_n  # 0 without shards
        at_one_n, sum_n, weighted_n = sums
        scaled_n = below_n / shard.temperature
        # Relative to the largest of all shards; the weighted sum is of differences from it.
        parts = [at_one_n * below_n.exp(), sum_n * scaled_n.exp(), (weighted_n + scaled_n * sum_n) * scaled_n.exp()]
        at_one_n, sum_n, weighted_n = shard.all_reduce(torch.stack(parts, dim=-1), dist.ReduceOp.SUM).unbind(-1)
        return cls(
            log_sum_n=peak_n / shard.temperature + sum_n.log(),
            log_sum_at_one_n=peak_n + at_one_n.log(),
            entropy_n=sum_n.log() - weighted_n / sum_n,
            argmax_n=argmax_n,
        )


def row_sums(logits_bV: torch.Tensor, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [b, 4] and the largest logit's place, int64 [b].

    With d = z - max z and t = d / temperature the four are max z, sum exp d, sum exp t, sum t exp t.
    """
    peak_b, place_b = logits_bV.max(-1)
    below_bV = logits_bV - peak_b[:, None]
    exp_bV = below_bV.exp()
    at_one_b = exp_bV.sum(-1)
    if temperature != 1.0:
        below_bV = below_bV / temperature
        exp_bV = below_bV.exp()
    return torch.stack([peak_b, at_one_b, exp_bV.sum(-1), (exp_bV * below_bV).sum(-1)], dim=-1), place_b
