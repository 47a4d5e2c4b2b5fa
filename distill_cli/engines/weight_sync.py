"""Receive the student's weights or adapter in its engine: check names and shapes, gather them by the bucket."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

from distill_cli.errors import DistillError
from distill_cli.machine.torch_versions import all_gather
from distill_cli.models import model_files

BUCKET_BYTES = 2**26
"""Bytes of tensors that are gathered by one collective; a larger tensor has its own."""
ALIGNMENT = 16
"""Tensors begin at multiples of it in a bucket, so that their bytes can be read as any dtype."""


@dataclass(frozen=True)
class Deferred:
    """A weight that is made when its turn comes, so that only one of them exists at a time."""

    shape: torch.Size
    make: Callable[[], torch.Tensor]
    """A collective if it returns a DTensor."""


@dataclass(frozen=True)
class Converted:
    """Stored tensors that are made of a model's parameters together, such as each expert's matrices of one tensor."""

    shapes: Mapping[str, torch.Size]
    """Shapes of the stored tensors, by name."""
    params: Sequence[tuple[str, torch.Tensor | Deferred]]
    convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
    """Returns the stored tensors, given the parameters whole."""


Outgoing = tuple[str, torch.Tensor | Deferred] | Converted
"""Weights on their way to an engine, under their names in the model's files."""


def expected_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors in a model's files, which an engine is loaded from."""
    return {name: torch.Size(shape) for name, shape in model_files.shapes(folder).items()}


def shapes_of(weights: Sequence[Outgoing]) -> list[tuple[str, torch.Size]]:
    """Return names and shapes of the tensors that will be sent, in their order."""
    shapes: list[tuple[str, torch.Size]] = []
    for one in weights:
        shapes += one.shapes.items() if isinstance(one, Converted) else [(one[0], one[1].shape)]
    return shapes


def adapter_shapes(
    weights: Sequence[Outgoing], *, rank: int, expected: Mapping[str, torch.Size]
) -> dict[str, torch.Size]:
    """Return names and shapes of both matrices of each layer that an adapter's tensors name.

    Args:
        weights: `base_model.model.<layer>.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank], as in peft.
        expected: the shapes of the model.
    """
    shapes = {}
    for name, _ in shapes_of(weights):
        prefix = name.rpartition(".lora_")[0]
        if out_in := expected.get(f"{prefix.removeprefix('base_model.model.')}.weight"):
            shapes[f"{prefix}.lora_A.weight"] = torch.Size((rank, out_in[-1]))
            shapes[f"{prefix}.lora_B.weight"] = torch.Size((out_in[0], rank))
    return shapes


def check_names_and_shapes(
    weights: Sequence[Outgoing], *, expected: Mapping[str, torch.Size], optional: Collection[str] = ()
) -> None:
    """Raise DistillError naming what differs: a wrong tensor in the middle of a load would break the engine."""
    pairs = shapes_of(weights)
    given = dict(pairs)
    problems = [f"{name} is not in the model's files" for name in given.keys() - expected.keys()]
    problems += [f"{name} is missing" for name in expected.keys() - given.keys() - set(optional)]
    problems += [
        f"{name} has shape {list(given[name])}, the model's files have {list(expected[name])}"
        for name in given.keys() & expected.keys()
        if given[name] != expected[name]
    ]
    if len(given) != len(pairs):
        problems.append("a name is given twice")
    if problems or not weights:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        what = "; ".join(sorted(problems)[:3]) or "there are no tensors"
        raise DistillError(f"weights refused, the engine keeps its own: {what}{more}")


def full_tensors(weights: Iterable[Outgoing], *, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather parameters, as many at a time as fit into BUCKET_BYTES. A collective for DTensors: every rank iterates
    over all, in the same order.

    Matrices are cast to `dtype`, if given, before they are gathered: half as many bytes travel to a 16-bit engine.
    Vectors and scalars are not: vLLM keeps some of them (a router's bias) in float32, and casts the others itself.
    """
    bucket, group = list[tuple[str, DTensor]](), None
    for one in weights:
        if isinstance(one, Converted):
            yield from _gathered(bucket, group)  # collective
            bucket = []
            yield from one.convert(dict(full_tensors(one.params, dtype=dtype))).items()  # collective
            continue
        name, tensor = one
        tensor = tensor.make() if isinstance(tensor, Deferred) else tensor.detach()
        if dtype is not None and tensor.ndim > 1:
            tensor = tensor.to(dtype)
        its_group = _shard_group(tensor)
        if bucket and (its_group is not group or _num_bytes(tensor, *(other for _, other in bucket)) > BUCKET_BYTES):
            yield from _gathered(bucket, group)  # collective
            bucket = []
        if isinstance(tensor, DTensor) and its_group is not None:
            bucket, group = [*bucket, (name, tensor)], its_group
        else:
            yield name, whole(tensor)  # collective
    yield from _gathered(bucket, group)  # collective


def _num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _shard_group(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that a small tensor's rows, and nothing else, are cut over; None if it is laid out otherwise."""
    if not isinstance(tensor, DTensor) or _num_bytes(tensor) > BUCKET_BYTES:
        return None
    mesh = tensor.device_mesh
    cut = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(cut) != 1 or type(tensor.placements[cut[0]]) is not Shard or tensor.placements[cut[0]] != Shard(0):
        return None
    return mesh.get_group(cut[0]) if mesh.size(cut[0]) > 1 else None


def _gathered(
    bucket: Sequence[tuple[str, DTensor]], group: dist.ProcessGroup | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather tensors whose rows are cut over `group` in one collective, as bytes."""
    if not bucket or group is None:
        return
    size, parts, places, length = group.size(), list[torch.Tensor](), list[tuple[int, int, int]](), 0
    for _, tensor in bucket:
        rows = -(-tensor.shape[0] // size)  # of all ranks but the last ones
        local = tensor.to_local().to(tensor.device_mesh.device_type).contiguous()
        row_bytes = math.prod(tensor.shape[1:]) * tensor.element_size()
        padded = -(-rows * row_bytes // ALIGNMENT) * ALIGNMENT
        parts.append(F.pad(local.flatten().view(torch.uint8), (0, padded - local.shape[0] * row_bytes)))
        places.append((length, rows, row_bytes))
        length += padded
    mine = torch.cat(parts)
    everyone = mine.new_empty(size, length)
    all_gather(everyone.view(-1), mine, group=group)
    for (name, tensor), (begin, rows, row_bytes) in zip(bucket, places, strict=True):
        whole_bytes = everyone[:, begin : begin + rows * row_bytes].reshape(-1)[: tensor.shape[0] * row_bytes]
        yield name, whole_bytes.view(tensor.dtype).view(tensor.shape)


def whole(param: torch.Tensor) -> torch.Tensor:
    """Return the full parameter on its mesh's device, detached. A collective for DTensors."""
    if not isinstance(param, DTensor):
        return param.detach()
    on_mesh: Any = param.detach().to(param.device_mesh.device_type)
    return on_mesh.full_tensor()


def whole_tensors(weights: Iterable[Outgoing]) -> dict[str, torch.Tensor]:
    """Return copies of all tensors in host memory, as an adapter is small. A collective for DTensors."""
    # vLLM scales B in place
    return {name: tensor.to("cpu", copy=True) for name, tensor in full_tensors(weights, dtype=None)}
