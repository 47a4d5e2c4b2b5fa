"""gloo ranks as forks of a process that has imported everything: starting each by itself costs seconds of imports.

For what ranks compute; how a run's own ranks are started is tested in tests/end_to_end.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist


def fork_ranks(num_ranks: int, rank_main: Callable[[], None]) -> None:
    """Runs `rank_main` on that many ranks of a process group. Exits with status 1 where one of them fails.

    This process must not have computed anything yet: threads do not live on in a fork.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = {_fork(rank, num_ranks, f"file://{folder}/store", rank_main) for rank in range(num_ranks)}
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                sys.exit(1)


def _fork(rank: int, num_ranks: int, store: str, rank_main: Callable[[], None]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
        rank_main()
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
