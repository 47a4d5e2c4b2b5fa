"""The device mesh: one place that says what each axis is for.

| axis      | what differs along it                                     |
|-----------|-----------------------------------------------------------|
| replicate | sequences; the shards of parameters are the same (HSDP)    |
| shard     | sequences, and the shards of parameters (FSDP2)            |
| context   | pieces of the same sequences                               |
| tensor    | pieces of the same layers, for the same tokens             |

Sequences are shared out over replicate x shard (`data_rank`); the loss's token count and its sum run over replicate,
shard and context, gradients are summed over the same ranks. Tensor ranks hold equal copies of both.
Axes of size 1 are there too, so that every layout takes the same path.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Parallel:
    """This rank's place, and the meshes that the stages need."""

    mesh: DeviceMesh
    fsdp: DeviceMesh
    """The ranks that parameters are sharded over and gradients summed over."""
    device: torch.device

    @property
    def data_rank(self) -> int:
        """Which share of the sequences is this rank's."""
        return self.mesh["shard"].get_local_rank()

    @property
    def data_size(self) -> int:
        """Into how many shares the sequences are cut."""
        return self.mesh["shard"].size()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return dist.get_rank() == 0

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all shares of sequences, in place. A collective."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.fsdp.get_group())
        return values

    def all_max(self, value: float) -> float:
        """The largest of the shares' values. A collective."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.fsdp.get_group())
        return float(tensor)


def init_parallel(*, device: torch.device, timeout_s: float = 1800) -> Parallel:
    """Joins the process group that torchrun set up, and lays out the mesh. A collective."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device_id)
    return layout(device=device)


def layout(*, device: torch.device) -> Parallel:
    """All ranks on the shard axis."""
    mesh = init_device_mesh(device.type, (1, dist.get_world_size(), 1, 1), mesh_dim_names=AXES)
    return Parallel(mesh=mesh, fsdp=mesh["shard"], device=device)
