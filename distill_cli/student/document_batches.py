"""Calls of attention for a packed row's documents: one each, and one for several short ones of similar length.

Below some length a call takes longer than the padding that saves it.

Shape letters: B rows, H heads, T tokens of a row; N documents of a call, L tokens of each; D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from distill_cli.parallel.context import Span

SHORT = 128
"""Documents of up to this many tokens share calls of attention on CPUs: below it a call costs more than padding."""


def by_batch(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: Span,
) -> torch.Tensor:
    """Attend to each document of the span, or to several short ones of similar length as a batch.

    Args:
        attend: causal attention of a batch; the last query is the last key's own.
    """
    batches = batches_of(span, query.device)
    # Split and not sliced: backward through a slice fills a tensor of the whole row.
    queries = _take(query, batches.queries).split([size[0] * size[1] for size in batches.sizes], dim=2)
    pairs = (_take(x, batches.keys).split([size[0] * size[2] for size in batches.sizes], dim=2) for x in (key, value))
    parts = []
    for (num, *_), q, k, v in zip(batches.sizes, queries, *pairs, strict=True):
        out = attend(q, k, v) if num == 1 else _joined(attend(*(_as_batch(x, num) for x in (q, k, v))))
        parts.append(out)
    out_BHTD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return _take(out_BHTD, batches.order)


@dataclass(frozen=True)
class Batches:
    """Documents of a span by the calls of attention that take them."""

    sizes: tuple[tuple[int, int, int], ...]
    """(documents, queries of each, keys of each) of each call."""
    queries: torch.Tensor | None = None
    """int64: the span's queries in the order of the calls; shorter documents repeat their last. None is as they are."""
    keys: torch.Tensor | None = None
    order: torch.Tensor | None = None
    """int64: places of the span's queries in the calls' output, one call after the other."""


@lru_cache(maxsize=8)  # all layers of a micro-batch use the same
def batches_of(span: Span, device: torch.device) -> Batches:
    """Batch documents of at most SHORT tokens, each at least three quarters as long as the longest of its batch."""
    documents = list(zip(pairwise(span.query_bounds), pairwise(span.key_bounds), strict=True))
    sizes = [(q_end - q, k_end - k) for (q, q_end), (k, k_end) in documents]
    short = [place for place, (queries, keys) in enumerate(sizes) if queries == keys <= SHORT]
    calls = [[place] for place in range(len(sizes)) if place not in set(short)]
    longest = 0
    for place in sorted(short, key=lambda place: (-sizes[place][0], place)):
        if longest == 0 or sizes[place][0] < 0.75 * longest:
            longest = sizes[place][0]
            calls.append([])
        calls[-1].append(place)
    if all(len(call) == 1 for call in calls):
        return Batches(tuple((1, *size) for size in sizes))

    def places(side: int) -> list[torch.Tensor]:
        found = []
        for call in calls:
            length = sizes[call[0]][side]
            for place in call:
                begin, end = documents[place][side]
                found.append(torch.arange(begin, begin + length).clamp(max=end - 1))
        return found

    order, begin = torch.empty(span.query_bounds[-1], dtype=torch.int64), 0
    for call in calls:
        for place in call:
            order[slice(*documents[place][0])] = torch.arange(begin, begin + sizes[place][0])
            begin += sizes[call[0]][0]
    shapes = tuple((len(call), *sizes[call[0]]) for call in calls)
    return Batches(shapes, *(index.to(device) for index in (torch.cat(places(0)), torch.cat(places(1)), order)))


def _take(x_BHTD: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Return these tokens, or all for None; tokens lie side by side in memory before heads do."""
    return x_BHTD if places is None else x_BHTD.transpose(1, 2).index_select(1, places).transpose(1, 2)


def _as_batch(x_1HTD: torch.Tensor, num: int) -> torch.Tensor:
    """Return [1, H, num x L, D] as [num, H, L, D]."""
    return x_1HTD.transpose(1, 2).unflatten(1, (num, -1))[0].transpose(1, 2)


def _joined(x_NHLD: torch.Tensor) -> torch.Tensor:
    """Return [num, H, L, D] as [1, H, num x L, D]."""
    return x_NHLD.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)
