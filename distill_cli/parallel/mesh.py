"""The device mesh: one place that says what each axis is for, and what runs over which of them.

| axis      | what differs along it                                              |
|-----------|--------------------------------------------------------------------|
| replicate | sequences; the shards of parameters are the same (HSDP)             |
| shard     | sequences, and the shards of parameters (FSDP2)                     |
| context   | pieces of the same sequences, and the shards of parameters          |
| tensor    | pieces of the same layers, for the same tokens                      |

| what                                        | over                            |
|---------------------------------------------|---------------------------------|
| the order of the data: shares of sequences   | replicate x shard               |
| parameters, gradients and optimizer are cut  | shard x context, and tensor     |
| the loss's token count, its sum, metrics     | replicate x shard x context     |
| gradients are summed                        | replicate x shard x context     |
| the gradient's norm                         | all four (by DTensor)           |

Ranks count up fastest along tensor, then context: the axes that talk most lie within a node. Axes of size 1 are there
too, so that every layout takes the same path.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill_cli.errors import ConfigError

AXES = ("replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the mesh, and the submeshes that training uses."""

    mesh: DeviceMesh
    fsdp: DeviceMesh
    """shard x context as one axis, behind replicate where there is more than one copy (HSDP)."""
    loss: DeviceMesh
    """replicate x shard x context as one axis."""
    device: torch.device
    sequence_parallel: bool = False

    @property
    def data_rank(self) -> int:
        """Index of this rank's share of the sequences."""
        return self.mesh["replicate"].get_local_rank() * self.mesh["shard"].size() + self.mesh["shard"].get_local_rank()

    @property
    def data_size(self) -> int:
        """Number of shares that the sequences are split into."""
        return self.mesh["replicate"].size() * self.mesh["shard"].size()

    @property
    def context(self) -> DeviceMesh:
        return self.mesh["context"]

    @property
    def tensor(self) -> DeviceMesh:
        return self.mesh["tensor"]

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


def init_parallel(
    *,
    tensor: int = 1,
    context: int = 1,
    replicate: int = 1,
    sequence_parallel: bool = False,
    device: torch.device,
    timeout_s: float = 1800,
) -> Parallel:
    """Join the process group that torchrun set up, and build the mesh (`layout`). A collective.

    Args:
        timeout_s: seconds after which a collective fails.

    Raises:
        ConfigError: the mesh's sizes do not divide the ranks.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # No device_id: bound to a device, torch splits the NCCL communicator of all ranks for every later group, including
    # those of one rank and of gloo, of which vLLM makes dozens. Unbound, a communicator is made at its first use.
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return layout(
        tensor=tensor, context=context, replicate=replicate, sequence_parallel=sequence_parallel, device=device
    )


def layout(
    *, tensor: int = 1, context: int = 1, replicate: int = 1, sequence_parallel: bool = False, device: torch.device
) -> Parallel:
    """Build the mesh over all ranks of the process group; the shard axis takes the ranks that are left. A collective.

    Args:
        tensor: size of the tensor axis; likewise `context` and `replicate`.
        sequence_parallel: split the tokens, too, over the tensor axis, outside attention and MLP.

    Raises:
        ConfigError: the product of the sizes does not divide the ranks.
    """
    taken = replicate * context * tensor
    if dist.get_world_size() % taken:
        raise ConfigError(
            f"mesh.replicate={replicate}, mesh.context={context}, mesh.tensor={tensor}: their product {taken} must "
            f"divide the {dist.get_world_size()} ranks"
        )
    sizes = (replicate, dist.get_world_size() // taken, context, tensor)
    ranks = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    fsdp = ranks["shard", "context"]._flatten("fsdp")
    return Parallel(
        mesh=ranks,
        fsdp=ranks["replicate", "fsdp"] if replicate > 1 else fsdp,
        loss=ranks["replicate", "shard", "context"]._flatten("loss"),
        device=device,
        sequence_parallel=sequence_parallel,
    )
