"""Prepare this process to hold engines as a rank does. Import this module before torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distill_cli.engines.process_setup import import_transformers, prepare_process

prepare_process()
import_transformers()

import os  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from distill_cli.launch.nodes import free_port  # noqa: E402


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Set up the process group of a single rank. Close engines before leaving."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(variables, MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_gib() -> float:
    """Return the free GPU memory in GiB, 0 without a GPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
