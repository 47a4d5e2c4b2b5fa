"""Attention over packed documents: [1, H, T, D] and the documents' bounds, never a mask.

Registered with transformers under a name that its mask registry does not know, so that it builds no mask; the bounds
come through the model's forward as `documents`, host integers.

Shape letters: H heads, G key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from distill_cli.errors import DistillError
from distill_cli.machine.torch_versions import varlen_attention
from distill_cli.parallel.context import Documents, Span, gather_row

NAME = "distill_packed"


def attend_packed(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    *,
    documents: Documents,
    scale: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query_1HTD: with key and value this rank's part of the row, where context-parallel ranks share it: then a
            collective.
        documents: their bounds in the row, and which part is this rank's.
        window: a token sees itself and the window - 1 tokens before it; None is all before it.

    Returns:
        [1, H, T, D], in the query's dtype.
    """
    key_1GTD, value_1GTD = gather_row(key_1GTD, documents), gather_row(value_1GTD, documents)
    attend = _attend_by_document
    if query_1HTD.is_cuda and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        attend = _attend_varlen
    parts = []
    for span in documents.spans():
        queries, keys = slice(span.begin, span.end), slice(*span.keys)
        parts.append(
            attend(query_1HTD[:, :, queries], key_1GTD[:, :, keys], value_1GTD[:, :, keys], span, scale, window)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scale: float | None, window: int | None
) -> torch.Tensor:
    if query.is_cuda:  # of float32: grouped heads go only to the kernel that holds [queries, keys] of every head
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts, grouped = [], query.shape[1] != key.shape[1]
    bounds = zip(pairwise(span.query_bounds), pairwise(span.key_bounds), strict=True)
    for (first, last), (first_key, last_key) in bounds:
        num_queries, num_keys = last - first, last_key - first_key
        is_plain = num_queries == num_keys and not (window and window < num_keys)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, first:last],
                key[:, :, first_key:last_key],
                value[:, :, first_key:last_key],
                attn_mask=None if is_plain else _mask(num_queries, num_keys, window, query.device),
                is_causal=is_plain,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scale: float | None, window: int | None
) -> torch.Tensor:
    query_bounds, key_bounds = (_on_device(bounds, query.device) for bounds in (span.query_bounds, span.key_bounds))
    out_THD = varlen_attention(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        query_bounds,
        key_bounds,
        max(end - begin for begin, end in pairwise(span.query_bounds)),
        max(end - begin for begin, end in pairwise(span.key_bounds)),
        window_size=(window - 1 if window else -1, 0),  # the last query is aligned with the last key
        scale=scale,
    )
    return out_THD.transpose(0, 1)[None]


@lru_cache(maxsize=8)
def _on_device(bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32. Kept, since every layer of a micro-batch asks for the same, and a copy waits for all that the GPU does."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys], true where a query may look; the last query is the last key's own."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    before = num_keys - num_queries
    seen = ones.tril(before)
    return seen & ones.triu(before + 1 - window) if window else seen


# Kept out of compiled layers: the bounds differ from batch to batch, and each would be compiled anew.
@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    assert documents is not None, "the packed attention needs the documents' bounds"
    if softcap is not None or s_aux is not None or dropout:
        raise DistillError("the packed attention has no soft cap, sinks or dropout, and this model asks for one")
    out_1HTD = attend_packed(query, key, value, documents=documents, scale=scaling, window=sliding_window)
    return out_1HTD.transpose(1, 2).contiguous(), None


def register() -> None:
    AttentionInterface.register(NAME, packed_attention)
