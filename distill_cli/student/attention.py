"""Attention over packed documents: [1, H, T, D] and the documents' bounds, never a mask.

Registered with transformers under a name that its mask registry does not know, so that it builds no mask; the bounds
come through the model's forward as `document_bounds`, a tuple of host integers.

Shape letters: H heads, G key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from distill_cli.errors import DistillError

NAME = "distill_packed"


def attend_packed(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    *,
    document_bounds: tuple[int, ...],
    scale: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        document_bounds: 0, then the end of each document; the last is T.
        window: a token sees itself and the window - 1 tokens before it; None is all before it.

    Returns:
        [1, H, T, D], in the query's dtype.
    """
    grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    if query_1HTD.is_cuda and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        return _attend_varlen(query_1HTD, key_1GTD, value_1GTD, document_bounds, scale, window, grouped)
    parts = []
    for begin, end in pairwise(document_bounds):
        document = (slice(None), slice(None), slice(begin, end))
        mask = _window_mask(end - begin, window, query_1HTD.device) if window and window < end - begin else None
        parts.append(
            F.scaled_dot_product_attention(
                query_1HTD[document],
                key_1GTD[document],
                value_1GTD[document],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2)


def _attend_varlen(query, key, value, document_bounds, scale, window, grouped) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor(document_bounds, dtype=torch.int32, device=query.device)
    longest = max(end - begin for begin, end in pairwise(document_bounds))
    out_THD = varlen_attn(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        window_size=(window - 1 if window else -1, 0),
        scale=scale,
        enable_gqa=grouped,
    )
    return out_THD.transpose(0, 1)[None]


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length], true where a query may look."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_bounds: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    assert document_bounds is not None, "the packed attention needs the documents' bounds"
    if softcap is not None or s_aux is not None or dropout:
        raise DistillError("the packed attention has no soft cap, sinks or dropout, and this model asks for one")
    out_1HTD = attend_packed(query, key, value, document_bounds=document_bounds, scale=scaling, window=sliding_window)
    return out_1HTD.transpose(1, 2).contiguous(), None


def register() -> None:
    AttentionInterface.register(NAME, packed_attention)
