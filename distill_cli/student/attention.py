"""Attention over packed documents by their bounds instead of a mask: flex, varlen and CPU kernels.

Registered with transformers under a name that its mask registry does not know, so that it builds no mask. The model's
forward passes the bounds as `documents`, host integers.

Shape letters: H heads, G key-value heads, T tokens, D head size.
"""

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from distill_cli.errors import DistillError
from distill_cli.machine.torch_versions import varlen_attention
from distill_cli.parallel.context import Documents, Span, gather_row

NAME = "distill_packed"


# Kept out of compiled layers: the bounds differ from batch to batch, and each set would be compiled again.
@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, by transformers' attention interface.

    Args:
        query: [1, H, T, D], with key and value [1, G, T, D] this rank's part of the row. A collective if
            context-parallel ranks share it.
        documents: their bounds in the row, and this rank's part of it.
        sliding_window: a token sees itself and the window - 1 tokens before it; None is all before it.

    Returns:
        [1, T, H, D], in the query's dtype, and no weights.
    """
    assert documents is not None, "the packed attention needs the documents' bounds"
    if others.get("softcap") is not None or others.get("s_aux") is not None or others.get("dropout"):
        raise DistillError("the packed attention has no soft cap, sinks or dropout, and this model needs one")
    row = gather_row(key, documents), gather_row(value, documents)
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    attend = _attend_varlen if query.is_cuda and is_half else _attend_by_document
    parts = []
    for span in documents.spans():
        queries = query.narrow(2, span.begin, span.query_bounds[-1])
        keys, values = (x[:, :, slice(*span.keys)] for x in row)
        parts.append(attend(queries, keys, values, span, scaling, sliding_window))
    out_1HTD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out_1HTD.transpose(1, 2).contiguous(), None


def _attend_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scale: float | None, window: int | None
) -> torch.Tensor:
    if query.is_cuda:  # float32: only the kernel that holds [queries, keys] of every head takes grouped heads
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts, grouped = [], query.shape[1] != key.shape[1]
    bounds = zip(pairwise(span.query_bounds), pairwise(span.key_bounds), strict=True)
    for (first, last), (first_key, last_key) in bounds:
        sizes = last - first, last_key - first_key
        is_plain = sizes[0] == sizes[1] and not (window and window < sizes[1])
        mask = None if is_plain else _mask(*sizes, window, query.device)
        q, (k, v) = query[:, :, first:last], (x[:, :, first_key:last_key] for x in (key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_plain, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, dim=2)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scale: float | None, window: int | None
) -> torch.Tensor:
    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds = [_on_device(bounds, query.device) for bounds in (span.query_bounds, span.key_bounds)]
    longest = [max(b - a for a, b in pairwise(bounds)) for bounds in (span.query_bounds, span.key_bounds)]
    size = (window - 1 if window else -1, 0)  # the last query is aligned with the last key
    out_THD = varlen_attention(query_THD, key_TGD, value_TGD, *bounds, *longest, window_size=size, scale=scale)
    return out_THD.transpose(0, 1)[None]


@lru_cache(maxsize=8)
def _on_device(bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return int32 bounds; cached, since every layer of a micro-batch uses the same, and a copy waits for the GPU."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [queries, keys], true if the query sees the key; the last query is the last key's own."""
    before = num_keys - num_queries
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(before)
    return seen.triu(before + 1 - window) if window else seen


def register() -> None:
    """Make the packed attention known to transformers as NAME."""
    AttentionInterface.register(NAME, packed_attention)
