"""gloo ranks as forks of a process that has imported everything: starting each by itself costs seconds of imports.

For what ranks compute; how a run's own ranks are started is tested in tests/end_to_end.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.machine.hardware import threads_of_rank
from distill_cli.student import attention, model

model.SMALL_BYTES = 0  # the models here are small, and laid out like large ones

ROOT = Path(__file__).parent.parent.parent
MOST_CASES = 16
"""Cases of one start of ranks: each case's mesh leaves its groups' threads behind, and hundreds slow the others."""


def run_cases(module: str, cases: Sequence[dict[str, Any]], *, timeout_s: float = 900) -> list[Any]:
    """What `python -m module`, whose main is `case_ranks`, makes of each case on its number of `ranks`."""
    numbers = sorted(range(len(cases)), key=lambda number: cases[number]["ranks"])
    alike = [list(group) for _, group in groupby(numbers, key=lambda number: cases[number]["ranks"])]
    groups = [group[first : first + MOST_CASES] for group in alike for first in range(0, len(group), MOST_CASES)]
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups_json = json.dumps([[cases[number] for number in group] for group in groups])
        command = [sys.executable, "-m", module, folder, groups_json]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, done.stderr[-4000:]
        for index, group in enumerate(groups):
            results = torch.load(Path(folder) / f"{index}.pt", weights_only=True)
            found |= dict(zip(group, results, strict=True))
    return [found[number] for number in range(len(cases))]


def case_ranks(result_of: Callable[[dict[str, Any]], Any]) -> None:
    """The command that `run_cases` starts: cases of as many ranks share theirs, and rank 0 writes what each came to."""
    folder, groups = Path(sys.argv[1]), json.loads(sys.argv[2])
    attention.register()

    def run_all(index: int) -> None:
        results = [result_of(case) for case in groups[index]]
        if dist.get_rank() == 0:
            torch.save(results, folder / f"{index}.pt")

    for index, cases in enumerate(groups):
        fork_ranks(cases[0]["ranks"], lambda index=index: run_all(index))


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
        torch.set_num_threads(threads_of_rank(num_ranks))
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
