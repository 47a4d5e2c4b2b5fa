"""The device mesh: the purpose of each axis, and the collectives over it.

| axis      | what differs along it                                              |
|-----------|--------------------------------------------------------------------|
| replicate | sequences; the shards of parameters are the same (HSDP)             |
| shard     | sequences, and the shards of parameters (FSDP2)                     |
| expert    | sequences, and experts: a part of the shard axis                    |
| context   | pieces of the same sequences, and the shards of parameters          |
| tensor    | pieces of the same layers, for the same tokens                      |

| what                                        | over                            |
|---------------------------------------------|---------------------------------|
| the order of the data: shares of sequences   | replicate x shard               |
| parameters, gradients and optimizer are cut  | shard x context, and tensor     |
| experts are cut                             | expert, then the rest of shard x context |
| the loss's token count, its sum, metrics     | replicate x shard x context     |
| gradients are summed                        | replicate x shard x context     |
| the gradient's norm                         | all four (by DTensor)           |

Ranks count up fastest along tensor, then context: the axes that communicate most lie within a node. Axes of size 1
exist too, so that every layout takes the same path.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill_cli.errors import ConfigError

TIMEOUT_S = 1800.0
"""Seconds after which a collective fails."""


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the mesh, and the submeshes that training uses."""

    fsdp: DeviceMesh
    """shard x context as one axis, behind replicate if there is more than one copy (HSDP)."""
    loss: DeviceMesh
    """replicate x shard x context as one axis."""
    context: DeviceMesh
    tensor: DeviceMesh
    expert: DeviceMesh
    """Ranks that share the experts of each layer; part of the shard axis."""
    expert_fsdp: DeviceMesh
    """Ranks with the same experts: `fsdp` without the expert axis."""
    data_rank: int
    """Index of this rank's share of the sequences."""
    data_size: int
    """Number of shares that the sequences are split into."""
    device: torch.device
    sequence_parallel: bool = False

    @property
    def data_ranks(self) -> list[int]:
        """`data_rank` of each rank."""
        return [rank // (self.size // self.data_size) for rank in range(self.size)]

    @property
    def length_multiple(self) -> int:
        """Pad the length of a packed row to a multiple of this: two pieces per context rank, each split evenly over the
        tensor ranks under sequence parallelism."""
        pieces = 2 * self.context.size() if self.context.size() > 1 else 1
        return pieces * (self.tensor.size() if self.sequence_parallel else 1)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return dist.get_rank() == 0

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum in place over the `loss` mesh; tensor ranks hold equal copies. A collective."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.loss.get_group())
        return values

    def sum_of_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum in place over all ranks, for counts that each rank makes on its own. A collective."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def all_max(self, value: float) -> float:
        """Return the maximum over all ranks. A collective."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)


def init_parallel(*, device: torch.device, timeout_s: float = TIMEOUT_S, **axes: Any) -> Parallel:
    """Join the process group that torchrun set up, and build the mesh. A collective.

    Args:
        timeout_s: seconds after which a collective fails.
        axes: the other arguments of `layout`.

    Raises:
        ConfigError: the mesh's sizes do not divide the ranks.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # No device_id: bound to a device, torch splits the NCCL communicator of all ranks for every later group, including
    # those of one rank and of gloo, of which vLLM makes dozens. Unbound, a communicator is created at its first use.
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return layout(device=device, **axes)


def layout(
    *,
    tensor: int = 1,
    context: int = 1,
    replicate: int = 1,
    expert: int = 1,
    sequence_parallel: bool = False,
    device: torch.device,
) -> Parallel:
    """Build the mesh over all ranks of the process group; the shard axis takes the remaining ranks. A collective.

    Args:
        tensor: size of the tensor axis; likewise `context`, `replicate` and `expert`.
        sequence_parallel: split the tokens over the tensor axis too, outside attention and MLP.

    Raises:
        ConfigError: the product of the sizes does not divide the ranks.
    """
    num_ranks, taken = dist.get_world_size(), replicate * context * tensor * expert
    if num_ranks % taken:
        sizes = f"mesh.replicate={replicate}, mesh.context={context}, mesh.tensor={tensor}, mesh.expert={expert}"
        raise ConfigError(f"{sizes}: their product {taken} must divide the {num_ranks} ranks")
    shard = num_ranks // taken
    axes = {"replicate": replicate, "shard": shard, "expert": expert, "context": context, "tensor": tensor}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    fsdp = mesh["shard", "expert", "context"]._flatten("fsdp")
    expert_fsdp = mesh["shard", "context"]._flatten("expert_fsdp")
    return Parallel(
        fsdp=mesh["replicate", "fsdp"] if replicate > 1 else fsdp,
        loss=mesh["replicate", "shard", "expert", "context"]._flatten("loss"),
        context=mesh["context"],
        tensor=mesh["tensor"],
        expert=mesh["expert"],
        expert_fsdp=mesh["replicate", "expert_fsdp"] if replicate > 1 else expert_fsdp,
        data_rank=dist.get_rank() // (context * tensor),
        data_size=replicate * shard * expert,
        device=device,
        sequence_parallel=sequence_parallel,
    )
