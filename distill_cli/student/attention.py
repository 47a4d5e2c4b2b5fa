"""Attention over documents by their bounds instead of a dense mask: flex, varlen and CPU kernels.

Registered with transformers under NAME, as an attention function and as the function that builds its masks. A model
asks for one mask for each kind of its layers (full, sliding, chunked); `describe_mask` answers with a `PackedMask`, and
the model hands it to the attention of each layer in the mask's place. So what a layer sees is what the model's own code
declares, not what its config is read to mean. `Student.forward` passes the documents in `documents_of`.

Not applied: attention dropout. The sampler has none, and the loss is about what it sampled.

Shape letters: B rows, H heads, G key-value heads, T tokens of a row, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from distill_cli.errors import DistillError
from distill_cli.machine.torch_versions import varlen_attention
from distill_cli.parallel.context import Documents, Span, gather_row
from distill_cli.student.document_batches import by_batch

NAME = "distill_packed"
QUERY_ROWS = 512
"""Queries whose scores `_attend_eagerly` holds at a time."""
KERNEL_HEAD_SIZE = 256
"""Largest size of a head that the varlen and flex kernels take."""
OTHER_TENSORS = {"position_ids", "cache_position"}
"""Tensors that models pass on to attention and that change nothing here."""

OWN_ATTENTION = "the student's code reads the attention mask itself, which is not supported; use another student"

_documents: ContextVar[Documents] = ContextVar("documents")
_num_calls = 0


@dataclass(frozen=True)
class Sight:
    """The keys that a query sees among those of its document up to itself."""

    window: int | None = None
    """It sees itself and the window - 1 keys before it; None is all before it."""
    chunk: int | None = None
    """It sees the keys of its own chunk, counted in chunks of this size from the document's begin."""

    def covers(self, num_keys: int) -> bool:
        """Return whether all keys of a document are seen: it is causal attention, and no more."""
        return all(size is None or size >= num_keys for size in (self.window, self.chunk))

    def allows(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return whether a query sees a key, given their positions in the document; of any shape."""
        allowed = key <= query
        if self.window is not None:
            allowed &= query - key < self.window
        if self.chunk is not None:
            allowed &= query // self.chunk == key // self.chunk
        return allowed


@dataclass(frozen=True)
class PackedMask:
    """What attention needs to know of a layer's mask."""

    documents: Documents
    sight: Sight | None
    """None: not that of a causal model. A model may build masks that none of its layers uses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DistillError(OWN_ATTENTION)

    def _refuse(self, *_operands: object) -> Any:
        raise DistillError(OWN_ATTENTION)

    __getitem__ = __add__ = __radd__ = __mul__ = __rmul__ = __invert__ = __len__ = __bool__ = _refuse


@dataclass(frozen=True)
class Scores:
    """How attention's scores are made, and what is done to them before the softmax."""

    scale: float
    """Factor of the products of queries and keys."""
    soft_cap: float | None = None
    """Scores s become cap * tanh(s / cap) (Gemma 2)."""
    sinks_H: torch.Tensor | None = None
    """A score of no key, one a head: the softmax counts it, and it has no value (gpt-oss)."""

    @property
    def is_plain(self) -> bool:
        return self.soft_cap is None and self.sinks_H is None


@contextmanager
def documents_of(documents: Documents) -> Iterator[None]:
    """Give the models that run inside the bounds of their input's documents.

    Raises:
        DistillError: no layer asked for attention: the model has its own, and its tokens saw other documents.
    """
    token, calls = _documents.set(documents), _num_calls
    try:
        yield
    finally:
        _documents.reset(token)
    if _num_calls == calls and not documents.is_rows:
        what = "the student's code does not use transformers' attention interface, so that documents are mixed up"
        raise DistillError(f"{what}; set train.packing=false, or use another student")


def describe_mask(*, mask_function: Callable[..., Any], local_size: int | None = None, **_others: object) -> PackedMask:
    """Return the description of a causal mask, by transformers' interface of mask functions.

    Args:
        mask_function: (row, head, query, key) -> whether the query sees the key, by their positions.
        local_size: size of a window or a chunk.
    """

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(0, 0, torch.tensor(query), torch.tensor(key)))

    sight: Sight | None = Sight()
    if sees(0, 1) or not sees(1 if local_size != 1 else 0, 0):
        sight = None
    elif local_size is not None:
        is_window = sees(local_size, 1)  # in a chunk of its own it would not see key 1
        sight = Sight(window=local_size) if is_window else Sight(chunk=local_size)
    return PackedMask(_documents.get(), sight)


# Kept out of compiled layers: the bounds differ from batch to batch, and each set would be compiled again.
@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PackedMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, by transformers' attention interface.

    Args:
        query: [B, H, T, D], with key and value [B, G, T, D]: one row of documents laid end to end, or rows of one
            document each. A collective if context-parallel ranks share the row.
        attention_mask: `describe_mask`'s.
        scaling: None is 1 / sqrt(D).
        softcap, s_aux: see `Scores`.

    Returns:
        [B, T, H, D], in the query's dtype, and no weights.

    Raises:
        DistillError: the layer asks for something else than that, such as a bias of its scores.
    """
    global _num_calls
    _num_calls += 1
    unknown = [name for name, value in others.items() if isinstance(value, torch.Tensor) and name not in OTHER_TENSORS]
    if unknown:
        what = f"{type(module).__name__} passes {', '.join(unknown)} to attention, which is not known here"
        raise DistillError(f"{what}; use another student")
    if not isinstance(attention_mask, PackedMask):
        what = f"{type(module).__name__} does not pass its mask to transformers' attention interface"
        raise DistillError(f"{what}: this model's documents cannot be told apart; use another")
    if attention_mask.sight is None:
        raise DistillError(f"{type(module).__name__} is not causal: it cannot be trained on next tokens; use another")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    documents, sight = attention_mask.documents, attention_mask.sight
    attend = choose_kernel(query, value, scores, sight)
    if documents.is_rows:
        return attend(query, key, value, documents.row_span, scores, sight).transpose(1, 2).contiguous(), None
    row = gather_row(key, documents), gather_row(value, documents)
    parts = []
    for span in documents.spans:
        queries = query.narrow(2, span.begin, span.query_bounds[-1])
        keys, values = (x[:, :, slice(*span.keys)] for x in row)
        parts.append(attend(queries, keys, values, span, scores, sight))
    out_BHTD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out_BHTD.transpose(1, 2).contiguous(), None


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Span, Scores, Sight], torch.Tensor]


def choose_kernel(query: torch.Tensor, value: torch.Tensor, scores: Scores, sight: Sight) -> Kernel:
    """Return the fastest kernel that is exact for these scores on the query's device and dtype."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and is_half and max(query.shape[-1], value.shape[-1]) <= KERNEL_HEAD_SIZE:
        return _attend_varlen if scores.is_plain and sight.chunk is None else _attend_flex
    return _attend_by_document if scores.is_plain else _attend_eagerly


def _attend_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scores: Scores, sight: Sight
) -> torch.Tensor:
    if query.is_cuda:  # only a kernel that holds [queries, keys] of every head would take grouped heads here
        key, value = (_one_per_head(x, query.shape[1]) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes = q.shape[2], k.shape[2]
        is_plain = sizes[0] == sizes[1] and sight.covers(sizes[1])
        mask = None if is_plain else _mask(*sizes, sight, query.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_plain, scale=scores.scale, enable_gqa=grouped)

    return by_batch(attend, query, key, value, span)


def _attend_eagerly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scores: Scores, sight: Sight
) -> torch.Tensor:
    """Attend with the scores of QUERY_ROWS queries in memory at a time, made again in backward if there are more."""

    def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Not `q @ k`: of that selective checkpointing would keep the result, which grows with the square of the length.
        products = torch.baddbmm(q.new_empty(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=scores.scale)
        weights = products.unflatten(0, q.shape[:2])
        if scores.soft_cap is not None:
            weights = scores.soft_cap * (weights / scores.soft_cap).tanh()
        weights = weights.masked_fill(~mask, -torch.inf)
        if scores.sinks_H is not None:
            sinks = scores.sinks_H.to(weights).view(1, -1, 1, 1).expand(*weights.shape[:-1], 1)
            weights = torch.cat([weights, sinks], dim=-1)
        weights = weights.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        return weights[..., : k.shape[2]].to(v.dtype) @ v

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = _mask(q.shape[2], k.shape[2], sight, query.device)
        pairs = list(zip(q.split(QUERY_ROWS, dim=2), mask.split(QUERY_ROWS), strict=True))
        if len(pairs) == 1:
            return attend_rows(q, k, v, mask)
        again = partial(checkpoint, attend_rows, use_reentrant=False)
        return torch.cat([again(rows, k, v, seen) for rows, seen in pairs], dim=2)

    key, value = (_one_per_head(x, query.shape[1]) for x in (key, value))
    return by_batch(attend, query, key, value, span)


def _one_per_head(x_BGTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return keys or values repeated for each head: [B, H, T, D]."""
    return x_BGTD.repeat_interleave(num_heads // x_BGTD.shape[1], dim=1)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scores: Scores, sight: Sight
) -> torch.Tensor:
    num_rows, value_size = query.shape[0], value.shape[-1]
    query, key, value = same_head_size(query, key, value)
    query_THD, key_TGD, value_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    ends = [span.query_bounds, span.key_bounds]
    if num_rows > 1:  # rows of one document each
        ends = [tuple(row * end[-1] for row in range(num_rows + 1)) for end in ends]
    bounds = [_on_device(end, query.device) for end in ends]
    longest = [max(b - a for a, b in pairwise(end)) for end in ends]
    size = (sight.window - 1 if sight.window else -1, 0)  # the last query is aligned with the last key
    out_THD = varlen_attention(query_THD, key_TGD, value_TGD, *bounds, *longest, window_size=size, scale=scores.scale)
    return out_THD.unflatten(0, (num_rows, -1)).transpose(1, 2)[..., :value_size]


def same_head_size(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values with zeros up to one size of head, a multiple of 8, as varlen attention needs.

    Neither scores nor the values' own part of the output change. The scores' scale must be that of the real size.
    """
    size = -8 * (max(x.shape[-1] for x in tensors) // -8)
    return tuple(x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in tensors)


def _attend_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scores: Scores, sight: Sight
) -> torch.Tensor:
    """Attend by a compiled flex kernel, on GPUs; a sink's share of the softmax follows from the scores' log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _compiled_flex()(
        query,
        key,
        value,
        score_mod=soft_capped(scores.soft_cap),
        block_mask=_block_mask(span, sight, query.device),
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out if scores.sinks_H is None else with_sinks(out, aux.lse, scores.sinks_H)


def soft_capped(cap: float | None) -> Callable[..., torch.Tensor] | None:
    """Return the score modification of flex attention for a soft cap."""
    if cap is None:
        return None

    def modify(score: torch.Tensor, *_place: torch.Tensor) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return modify


def with_sinks(out_BHTD: torch.Tensor, lse_BHT: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """Return attention's output with a sink in each head's softmax, given the log-sum-exp of its scores (natural)."""
    kept = torch.sigmoid(lse_BHT - sinks_H.to(lse_BHT)[:, None])
    return (out_BHTD * kept[..., None]).to(out_BHTD.dtype)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=8)  # all layers of a kind of a micro-batch use the same
def _block_mask(span: Span, sight: Sight, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = span.query_bounds[-1], span.key_bounds[-1]
    return create_block_mask(mask_mod(span, sight, device), None, None, *sizes, device=device)


def mask_mod(span: Span, sight: Sight, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return the mask of flex attention: whether a query sees a key, by their places in the span."""
    numbers, positions = [], []
    for bounds in (span.query_bounds, span.key_bounds):
        lengths = torch.tensor([b - a for a, b in pairwise(bounds)], device=device)
        ends = torch.tensor(bounds[1:], device=device).repeat_interleave(lengths)
        numbers.append(torch.arange(len(lengths), device=device).repeat_interleave(lengths))
        positions.append(torch.arange(bounds[-1], device=device) - ends)  # from the document's end, the same in both
    document_lengths = torch.tensor([b - a for a, b in pairwise(span.key_bounds)], device=device)

    def allows(_row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        document = numbers[0][query]
        length = document_lengths[document]
        seen = sight.allows(positions[0][query] + length, positions[1][key] + length)
        return (document == numbers[1][key]) & seen

    return allows


@lru_cache(maxsize=8)
def _on_device(bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return int32 bounds; cached, since every layer of a micro-batch uses the same, and a copy waits for the GPU."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _mask(num_queries: int, num_keys: int, sight: Sight, device: torch.device) -> torch.Tensor:
    """Return [queries, keys], true if the query sees the key; the last query is the last key's own."""
    keys = torch.arange(num_keys, device=device)
    return sight.allows(keys[num_keys - num_queries :, None], keys[None])


def register() -> None:
    """Make the attention and its masks known to transformers as NAME."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, describe_mask)
