"""Which ranks train and which sample, if each does one of them alone (`cluster.roles=split`).

The first ranks train, the others sample. The ranks of a role have a process group of their own, in which everything
works as if there were no others: the mesh, the engines, their collectives. `Bridge` connects the two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distill_cli.parallel.bridge import Mailbox, WeightChannel

RoleName = Literal["train", "sample"]


@dataclass(frozen=True)
class Bridge:
    """What the first rank that trains and the ranks that sample exchange."""

    commands: Mailbox
    """From the first rank that trains to the first that samples."""
    answers: Mailbox
    """Back."""
    weights: WeightChannel | None
    """None on the other ranks that train."""


@dataclass(frozen=True)
class Role:
    """What a rank does."""

    name: RoleName = "train"
    bridge: Bridge | None = None
    """None if all ranks do everything."""


SHARED = Role()


def join_roles(*, num_samplers: int, device: torch.device, timeout_s: float) -> Role:
    """Join the process group of this rank's role, with its ranks counted from 0. A collective of all ranks.

    Args:
        num_samplers: the last ranks, which sample.
        timeout_s: seconds after which a collective fails.
    """
    store, rank, size = next(rendezvous("env://"))
    num_trainers, timeout = size - num_samplers, timedelta(seconds=timeout_s)
    name: RoleName = "train" if rank < num_trainers else "sample"
    own_rank, own_size = (rank, num_trainers) if name == "train" else (rank - num_trainers, num_samplers)
    # vLLM reads them; LOCAL_RANK remains the one on this machine.
    os.environ |= {"RANK": str(own_rank), "WORLD_SIZE": str(own_size)}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = dist.PrefixStore(name, store)
    dist.init_process_group(backend, store=own, rank=own_rank, world_size=own_size, timeout=timeout)
    place, weights = 0 if name == "train" else 1 + own_rank, None
    if rank == 0 or name == "sample":
        group = dist.PrefixStore("weights", store)
        weights = WeightChannel(group, rank=place, size=1 + num_samplers, device=device, timeout=timeout)
    return Role(name, Bridge(Mailbox(store, "commands"), Mailbox(store, "answers"), weights))
