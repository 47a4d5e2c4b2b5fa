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

from distill_cli.config.schema import MeshConfig
from distill_cli.errors import ConfigError

AXES = ("replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Parallel:
    """This rank's place, and the meshes that the stages need."""

    mesh: DeviceMesh
    fsdp: DeviceMesh
    """shard x context as one axis, behind replicate where there is more than one copy (HSDP)."""
    loss: DeviceMesh
    """replicate x shard x context as one axis."""
    device: torch.device
    sequence_parallel: bool = False

    @property
    def data_rank(self) -> int:
        """Which share of the sequences is this rank's."""
        return self.mesh["replicate"].get_local_rank() * self.mesh["shard"].size() + self.mesh["shard"].get_local_rank()

    @property
    def data_size(self) -> int:
        """Into how many shares the sequences are cut."""
        return self.mesh["replicate"].size() * self.mesh["shard"].size()

    @property
    def context(self) -> DeviceMesh:
        return self.mesh["context"]

    @property
    def tensor(self) -> DeviceMesh:
        return self.mesh["tensor"]

    @property
    def length_multiple(self) -> int:
        """What the length of a packed row is padded to a multiple of: two pieces a context rank, each cut evenly over
        the tensor ranks under sequence parallelism."""
        pieces = 2 * self.context.size() if self.context.size() > 1 else 1
        return pieces * (self.tensor.size() if self.sequence_parallel else 1)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return dist.get_rank() == 0

    @property
    def rank(self) -> int:
        """Among all ranks."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size()

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all that differs in the loss, in place; tensor ranks hold equal copies. A collective."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.loss.get_group())
        return values

    def sum_of_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place: of what each did on its own. A collective."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def all_max(self, value: float) -> float:
        """The largest of all ranks' values. A collective."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)


def init_parallel(*, device: torch.device, mesh: MeshConfig | None = None, timeout_s: float = 1800) -> Parallel:
    """Joins the process group that torchrun set up, and lays out the mesh. A collective.

    Raises:
        ConfigError: the mesh's sizes do not divide the ranks.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Without device_id: bound to a device, torch splits all ranks' NCCL communicator anew for every group that is made
    # later, groups of one rank and of gloo included, of which vLLM makes dozens. Unbound, one is made at its first use.
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return layout(mesh or MeshConfig(), device=device)


def layout(mesh: MeshConfig, *, device: torch.device) -> Parallel:
    """The mesh over all ranks of the process group; FSDP's axis takes what the others leave. A collective."""
    taken = mesh.replicate * mesh.context * mesh.tensor
    if dist.get_world_size() % taken:
        raise ConfigError(
            f"mesh.replicate={mesh.replicate}, mesh.context={mesh.context}, mesh.tensor={mesh.tensor}: their product "
            f"{taken} must divide the {dist.get_world_size()} ranks"
        )
    sizes = (mesh.replicate, dist.get_world_size() // taken, mesh.context, mesh.tensor)
    ranks = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    fsdp = ranks["shard", "context"]._flatten("fsdp")
    return Parallel(
        mesh=ranks,
        fsdp=ranks["replicate", "fsdp"] if mesh.replicate > 1 else fsdp,
        loss=ranks["replicate", "shard", "context"]._flatten("loss"),
        device=device,
        sequence_parallel=mesh.sequence_parallel,
    )
