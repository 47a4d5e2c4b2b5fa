"""Parameters arrive whole, however their layout gathers them."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distill_cli.engines import weight_sync
from distill_cli.engines.weight_sync import Converted, Deferred, full_tensors


def gather_on_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    collectives = []
    gather_bytes = weight_sync.all_gather
    weight_sync.all_gather = lambda *args, **kwargs: collectives.append(1) or gather_bytes(*args, **kwargs)
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "cut"))
    generator = torch.Generator().manual_seed(0)
    rows, columns, copied, both = [Shard(0)], [Shard(1)], [Replicate(), Shard(0)], [Shard(0), Shard(1)]
    cases = [
        *[((size, 3), flat, rows) for size in (1, 3, 4, 5, 9, 16)],  # some ranks have no rows of the first
        *[((7,), flat, rows), ((6, 5, 2), flat, rows), ((8, 8), flat, columns), ((8, 3), flat, rows)],
        *[((7, 3), square, copied), ((9,), square, copied), ((8, 8), square, both), ((5, 5), flat, [Replicate()])],
    ]
    wanted = {f"{number}": torch.randn(shape, generator=generator) for number, (shape, *_) in enumerate(cases)}
    given = {
        name: distribute_tensor(tensor, mesh, placements)
        for (name, tensor), (_, mesh, placements) in zip(wanted.items(), cases, strict=True)
    }

    def assert_whole(dtype: torch.dtype | None) -> int:
        collectives.clear()
        weights = [*given.items(), ("plain", torch.ones(2)), ("made", Deferred(torch.Size((8, 3)), lambda: given["9"]))]
        joined = Converted({"two": torch.Size((16, 6))}, [("4", given["4"]), ("5", given["5"])], join)
        found = dict(full_tensors([*weights, joined, ("end", given["0"])], dtype=dtype))
        assert list(found) == [*wanted, "plain", "made", "two", "end"]
        expected = wanted | {"plain": torch.ones(2), "made": wanted["9"], "end": wanted["0"]}
        expected["two"] = join({name: wanted[name] for name in "45"})["two"]
        for name, tensor in expected.items():
            is_cast = dtype is not None and tensor.ndim > 1
            assert found[name].equal(tensor.to(dtype) if is_cast else tensor), name
        return len(collectives)

    def join(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"two": torch.cat([*tensors.values()])}

    assert assert_whole(None) == 6  # where the layout changes, before and after what is joined, and at the end
    assert_whole(torch.bfloat16)  # of two dtypes: vectors stay as they are
    weight_sync.BUCKET_BYTES = 100
    assert_whole(None)  # several buckets, and tensors with a collective of their own
    dist.destroy_process_group()


def test_buckets_arrive_whole(tmp_path: Path) -> None:
    mp.start_processes(partial(gather_on_rank, store=f"{tmp_path}/store"), nprocs=4, start_method="fork")
