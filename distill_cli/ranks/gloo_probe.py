"""One of two processes that add their ranks up over gloo: `python -m distill_cli.ranks.gloo_probe RANK PORT`.

The first prints what torch can do here, as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta


def main() -> None:
    import torch
    import torch.distributed as dist

    rank, port = int(sys.argv[1]), sys.argv[2]
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    if rank == 0:
        has_cuda = torch.cuda.is_available()
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_cuda and dist.is_nccl_available() else None
        found = {"sum": total.item(), "cuda": torch.version.cuda, "nccl": nccl, "has_cuda": has_cuda}
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
