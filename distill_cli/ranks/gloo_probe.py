"""Check collectives with two processes that sum a number over gloo: `python -m distill_cli.ranks.gloo_probe`.

The first prints what torch can do on this machine, as JSON, and exits with 0 if the sum is right.
"""

import json
import os
import signal
import socket
import sys
from datetime import timedelta

TIMEOUT_S = 60


def main() -> None:
    signal.alarm(TIMEOUT_S)  # ends a process that hangs
    import torch
    import torch.distributed as dist

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    rank = 0 if os.fork() else 1  # one import of torch is enough for both
    signal.alarm(TIMEOUT_S)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    if rank == 0:
        has_cuda = torch.cuda.is_available()
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_cuda and dist.is_nccl_available() else None
        print(json.dumps({"cuda": torch.version.cuda, "nccl": nccl, "has_cuda": has_cuda}))
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(total.item() != 3.0)


if __name__ == "__main__":
    main()
