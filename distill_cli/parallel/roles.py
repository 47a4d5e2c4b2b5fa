"""Which ranks train, which sample and which score, if each does one of them alone (`cluster.roles=split`).

The first ranks train, the next ones sample, then those of each teacher score. The ranks of a role have a process group
of their own, in which everything works as if there were no others: the mesh, the engines, their collectives. `Bridge`
connects the roles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distill_cli.parallel.bridge import Mailbox, WeightChannel

RoleName = Literal["train", "sample", "score"]


@dataclass(frozen=True)
class Link:
    """What a rank that trains and the engine that scores its sequences exchange."""

    requests: Mailbox
    """To the engine."""
    replies: WeightChannel
    """Back: tensors."""


@dataclass(frozen=True)
class Bridge:
    """What this rank exchanges with those of other roles."""

    commands: Mailbox
    """From the first rank that trains to the first that samples."""
    answers: Mailbox
    """Back."""
    weights: WeightChannel | None = None
    """From the first rank that trains to all that sample; None on others."""
    links: dict[int, list[Link]] = field(default_factory=dict)
    """By the teacher's index: on a rank that trains the one to its engine, on the first rank of an engine those to all
    that it scores for. Teachers whose engines are with the ranks that train have none."""


@dataclass(frozen=True)
class Role:
    """What a rank does."""

    name: RoleName = "train"
    teacher: int = -1
    """Index of the teacher that it scores with."""
    bridge: Bridge | None = None
    """None if all ranks do everything."""


SHARED = Role()


@dataclass(frozen=True)
class Engines:
    """The ranks of a teacher."""

    num_ranks: int
    """0 if its engines are with the ranks that train."""
    tensor_parallel: int

    @property
    def number(self) -> int:
        return self.num_ranks // self.tensor_parallel


def join_roles(*, num_samplers: int, teachers: Sequence[Engines] = (), device: torch.device, timeout_s: float) -> Role:
    """Join the process group of this rank's role, with its ranks counted from 0. A collective of all ranks.

    Args:
        timeout_s: seconds after which a collective fails.
    """
    store, rank, size = next(rendezvous("env://"))
    timeout = timedelta(seconds=timeout_s)
    num_trainers = size - num_samplers - sum(one.num_ranks for one in teachers)
    parts: list[tuple[RoleName, int, int]] = [("train", -1, num_trainers), ("sample", -1, num_samplers)]
    parts += [("score", index, one.num_ranks) for index, one in enumerate(teachers)]
    firsts = accumulate((number for _, _, number in parts), initial=0)
    found = zip(firsts, parts, strict=False)
    first, (name, teacher, own_size) = next(one for one in found if one[0] <= rank < one[0] + one[1][2])
    own_rank = rank - first
    # vLLM reads them; LOCAL_RANK remains the one on this machine.
    os.environ |= {"RANK": str(own_rank), "WORLD_SIZE": str(own_size)}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = dist.PrefixStore(f"{name}{teacher}", store)
    dist.init_process_group(backend, store=own, rank=own_rank, world_size=own_size, timeout=timeout)
    weights, links = None, dict[int, list[Link]]()
    if num_samplers and (rank == 0 or name == "sample"):
        group, place = dist.PrefixStore("weights", store), 0 if name == "train" else 1 + own_rank
        weights = WeightChannel(group, rank=place, size=1 + num_samplers, device=device, timeout=timeout)
    for index, engines in enumerate(teachers):
        for trainer in range(num_trainers) if engines.num_ranks else ():
            engine = trainer % engines.number * engines.tensor_parallel
            if (name == "train" and own_rank == trainer) or (teacher == index and own_rank == engine):
                group, at = dist.PrefixStore(f"teacher{index}/{trainer}", store), 0 if name == "score" else 1
                replies = WeightChannel(group, rank=at, size=2, device=torch.device("cpu"), timeout=timeout)
                links.setdefault(index, []).append(Link(Mailbox(group, "requests"), replies))
    return Role(name, teacher, Bridge(Mailbox(store, "commands"), Mailbox(store, "answers"), weights, links))
