"""Which engine does what, on ranks that are only pretended."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.parallel.sharing import EngineShare


@contextmanager
def rank_of(rank: int, *, size: int, tensor: int = 1, context: int = 1) -> Iterator[Parallel]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield layout(tensor=tensor, context=context, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "tensor", "context", "tensor_parallel", "block"),
    [
        (4, 1, 1, 1, 1),  # each rank scores for itself
        (4, 2, 1, 1, 2),  # peers share their sequences
        (8, 2, 2, 2, 4),
        (4, 1, 1, 2, 2),  # one engine for two data ranks
        (8, 2, 1, 4, 4),
        (12, 3, 1, 2, 6),  # neither divides the other
        (12, 1, 2, 3, 6),
    ],
)
def test_training_ranks_score_each_sequence_once(size, tensor, context, tensor_parallel, block):
    scored = Counter()
    for rank in range(size):
        with rank_of(rank, size=size, tensor=tensor, context=context) as parallel:
            share = EngineShare.near_training(tensor_parallel, parallel)
            assert parallel.data_rank in share.data_ranks
            assert share.num_engines == block // tensor_parallel
            if share.group is not None:
                first = rank // block * block
                assert dist.get_process_group_ranks(share.group) == list(range(first, first + block))
            if share.is_first:
                scored.update((data_rank, share.index) for data_rank in share.data_ranks)
    data_size = size // (tensor * context)
    assert scored == Counter((d, index) for d in range(data_size) for index in range(block // tensor_parallel))


def test_all_engines_share_all_work():
    places = []
    for rank in range(4):
        with rank_of(rank, size=4) as parallel:
            share = EngineShare.of_all_ranks(2, parallel)
            places.append((share.index, share.num_engines, share.is_first))
    assert places == [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]
