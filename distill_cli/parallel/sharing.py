"""Work shared out over ranks by its expected cost, and results brought together again."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")


def share_out(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Indices of `costs` in shares of about equal sum and number: the dearest first, each to the share with least.

    The same on every rank that calls it with the same costs. Indices rise within a share.
    """
    heap = [(0.0, 0, share) for share in range(num_shares)]
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, number, share = heapq.heappop(heap)
        shares[share].append(index)
        heapq.heappush(heap, (total + costs[index], number + 1, share))
    return [sorted(share) for share in shares]


def bring_together(
    mine: Sequence[Item], shares: Sequence[Sequence[int]], *, group: dist.ProcessGroup | None = None
) -> dict[int, Item]:
    """Index -> result, of all shares, on every rank of `group` (None is all ranks). A collective.

    Args:
        mine: the results of this rank's share, in its order; the group's i-th rank has the i-th share.
    """
    if len(shares) == 1:
        return dict(zip(shares[0], mine, strict=True))
    everyone: list[Sequence[Item] | None] = [None] * len(shares)
    dist.all_gather_object(everyone, list(mine), group=group)
    return {
        i: item for share, items in zip(shares, everyone, strict=True) for i, item in zip(share, items, strict=True)
    }
