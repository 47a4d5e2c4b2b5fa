"""Work partitioned over ranks by its expected cost, and results gathered again."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from distill_cli.parallel.mesh import Parallel

Item = TypeVar("Item")


def partition_by_cost(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Return indices of `costs` in shares of about equal sum and number: the dearest first, each to the least share.

    The same on every rank that calls it with the same costs. Indices rise within a share.
    """
    heap = [(0.0, 0, share) for share in range(num_shares)]
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, number, share = heapq.heappop(heap)
        shares[share].append(index)
        heapq.heappush(heap, (total + costs[index], number + 1, share))
    return [sorted(share) for share in shares]


def gather_items(
    mine: Sequence[Item], shares: Sequence[Sequence[int]], *, group: dist.ProcessGroup | None = None
) -> dict[int, Item]:
    """Return index -> result of all shares, on every rank of `group` (None is all ranks). A collective.

    Args:
        mine: the results of this rank's share, in its order. The group's ranks hold the shares in turn, and if there
            are more ranks than shares in runs of equal length; then the first of each run sends its results.
    """
    if len(shares) == 1:
        return dict(zip(shares[0], mine, strict=True))
    everyone: list[Sequence[Item]] = [[] for _ in range(dist.get_world_size(group))]
    ranks_per_share = len(everyone) // len(shares)
    is_first = dist.get_rank(group) % ranks_per_share == 0
    dist.all_gather_object(everyone, list(mine) if is_first else [], group=group)
    return {
        i: item
        for share, items in zip(shares, everyone[::ranks_per_share], strict=True)
        for i, item in zip(share, items, strict=True)
    }


@dataclass(frozen=True)
class EngineShare:
    """Which engine a rank is part of, among those that share some work; each is `num_ranks` consecutive ranks.

    The ranks of an engine call it with the same requests, and all of them get the results.
    """

    index: int
    """Of this rank's engine among those that share the work."""
    num_engines: int
    is_first: bool
    """Of the ranks of its engine: what an engine did is counted once."""
    group: dist.ProcessGroup | None
    """The ranks of these engines, for `gather_items`; None is all ranks."""
    data_ranks: range
    """Whose sequences these engines share."""

    def map(self, work: Callable[[list[int]], Sequence[Item]], costs: Sequence[float]) -> dict[int, Item]:
        """Return index -> result on every rank of `group`; `work` does the indices of this rank's engine. A collective.

        Args:
            costs: of each index, to partition them by.
        """
        shares = partition_by_cost(costs, self.num_engines)
        return gather_items(work(shares[self.index]), shares, group=self.group)

    @classmethod
    def of_all_ranks(cls, num_ranks: int, parallel: Parallel) -> EngineShare:
        """Every engine shares in the work of all ranks."""
        return cls(
            index=parallel.rank // num_ranks,
            num_engines=parallel.size // num_ranks,
            is_first=parallel.rank % num_ranks == 0,
            group=None,
            data_ranks=range(parallel.data_size),
        )

    @classmethod
    def near_training(cls, num_ranks: int, parallel: Parallel) -> EngineShare:
        """As few ranks as can be share in the work that they train on themselves: results do not travel further.

        The ranks that train on the same sequences are as many as context and tensor axis have; the smallest block of
        consecutive ranks that both whole such sets and whole engines fill is their least common multiple. A collective.
        """
        peers = parallel.context.size() * parallel.tensor.size()
        block = math.lcm(num_ranks, peers)
        num_engines = block // num_ranks
        # One engine's ranks have its results without asking each other.
        group = dist.new_subgroups(block)[0] if num_engines > 1 else None
        first_rank = parallel.rank // block * block
        return cls(
            index=parallel.rank % block // num_ranks,
            num_engines=num_engines,
            is_first=parallel.rank % num_ranks == 0,
            group=group,
            data_ranks=range(first_rank // peers, (first_rank + block) // peers),
        )
