"""Partition work over ranks by its expected cost, and gather the results."""

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
    """Split the indices of `costs` into shares of about equal sum and number: the dearest first, to the least share.

    Deterministic: ranks that pass the same costs get the same shares. Indices rise within a share.
    """
    heap = [(0.0, 0, share) for share in range(num_shares)]
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, number, share = heapq.heappop(heap)
        shares[share].append(index)
        heapq.heappush(heap, (total + costs[index], number + 1, share))
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class EngineShare:
    """The engine that a rank is part of, among those that share some work; each is `num_ranks` consecutive ranks.

    The ranks of an engine call it with the same requests, and all of them get the results.
    """

    index: int
    """Index of this rank's engine among those that share the work."""
    num_engines: int
    is_first: bool
    """Whether this is the first rank of its engine, which counts the engine's work."""
    group: dist.ProcessGroup | None
    """The ranks of these engines, which exchange results; None is all ranks."""
    data_ranks: range
    """Data ranks whose sequences these engines share."""

    def map(self, work: Callable[[list[int]], Sequence[Item]], costs: Sequence[float]) -> dict[int, Item]:
        """Return index -> result on every rank of `group`; `work` does the indices of this rank's engine. A collective.

        Args:
            costs: of each index, to partition them by.
        """
        shares = partition_by_cost(costs, self.num_engines)
        return self.exchange(shares, work(shares[self.index]))

    def exchange(self, shares: Sequence[Sequence[int]], mine: Sequence[Item]) -> dict[int, Item]:
        """Return index -> result on every rank of `group`. A collective.

        Args:
            shares: the indices that each engine worked on.
            mine: the results of this rank's engine, in the order of its share.
        """
        if len(shares) == 1:
            return dict(zip(shares[0], mine, strict=True))
        everyone: list[Sequence[Item]] = [[] for _ in range(dist.get_world_size(self.group))]
        dist.all_gather_object(everyone, list(mine) if self.is_first else [], group=self.group)
        of_engines = everyone[:: len(everyone) // len(shares)]  # the first rank of each sends its results
        return {
            i: item
            for share, items in zip(shares, of_engines, strict=True)
            for i, item in zip(share, items, strict=True)
        }

    @classmethod
    def of_all_ranks(cls, num_ranks: int, parallel: Parallel) -> EngineShare:
        """Share the work of all ranks among all engines."""
        return cls._of_block(parallel.size, num_ranks, parallel, None)

    @classmethod
    def near_training(cls, num_ranks: int, parallel: Parallel) -> EngineShare:
        """Share work among as few ranks as possible, those that train on it, so that results travel no further.

        A block of consecutive ranks that holds whole engines and whole sets of ranks that train on the same sequences:
        the least common multiple of their sizes. A collective.
        """
        block = math.lcm(num_ranks, parallel.context.size() * parallel.tensor.size())
        # The ranks of a single engine have its results without communication.
        group = dist.new_subgroups(block)[0] if block > num_ranks else None
        return cls._of_block(block, num_ranks, parallel, group)

    @classmethod
    def _of_block(cls, block: int, num_ranks: int, parallel: Parallel, group: dist.ProcessGroup | None) -> EngineShare:
        first, peers = parallel.rank // block * block, parallel.context.size() * parallel.tensor.size()
        return cls(
            index=parallel.rank % block // num_ranks,
            num_engines=block // num_ranks,
            is_first=parallel.rank % num_ranks == 0,
            group=group,
            data_ranks=range(first // peers, (first + block) // peers),
        )
