"""Who has which tokens of a row, and what their queries may see."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.parallel.context import Documents
from distill_cli.parallel.sharing import partition_by_cost


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4))
def test_queries_see_their_document_so_far(sizes: list[int], num_ranks: int) -> None:
    multiple = 2 * num_ranks if num_ranks > 1 else 1
    sizes = [*sizes, *[1] * (-sum(sizes) % multiple)]
    bounds = (0, *torch.tensor(sizes).cumsum(0).tolist())
    start = {t: a for a, b in pairwise(bounds) for t in range(a, b)}
    seen: dict[int, tuple[int, int]] = {}
    for rank in range(num_ranks):
        documents = Documents(bounds, rank=rank, size=num_ranks)
        mine = documents.take(torch.arange(bounds[-1]), 0).tolist()
        for span in documents.spans:
            for (q0, q1), (k0, k1) in zip(pairwise(span.query_bounds), pairwise(span.key_bounds), strict=True):
                for offset in range(q1 - q0):  # the last query is aligned with the last key
                    last = span.keys[0] + k1 - (q1 - q0) + offset
                    seen[mine[span.begin + q0 + offset]] = (span.keys[0] + k0, last)
    assert seen == {t: (start[t], t) for t in range(bounds[-1])}


def test_ranks_share_causal_attention_evenly() -> None:
    costs = [
        sum(t + 1 for t in Documents((0, 64), rank=r, size=4).take(torch.arange(64), 0).tolist()) for r in range(4)
    ]
    assert len(set(costs)) == 1


def test_order_restores_the_row() -> None:
    row = torch.arange(24)
    parts = [Documents((0, 24), rank=rank, size=3).take(row, 0) for rank in range(3)]
    whole = torch.empty_like(row)
    whole[Documents((0, 24), size=3).order()] = torch.cat(parts)
    assert torch.equal(whole, row)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 6))
def test_work_is_shared_once_and_evenly(costs: list[int], num_shares: int) -> None:
    shares = partition_by_cost(costs, num_shares)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    sums = [sum(costs[index] for index in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs, default=0)
