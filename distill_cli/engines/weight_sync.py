"""Receive the student's weights or adapter in its engine: check names and shapes, copy them one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distill_cli.errors import DistillError


@dataclass(frozen=True)
class Deferred:
    """A weight that is made when its turn comes, so that only one of them exists at a time."""

    shape: torch.Size
    make: Callable[[], torch.Tensor]
    """A collective if it returns a DTensor."""


NamedTensors = Sequence[tuple[str, torch.Tensor | Deferred]]


def expected_shapes(hf_config: Any, *, trust_remote_code: bool) -> tuple[dict[str, torch.Size], set[str]]:
    """Return names and shapes of a model's parameters in transformers, and the names that may be left out.

    The latter are those tied to another parameter. Nothing is allocated.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = shapes.keys() - {name for name, _ in model.named_parameters()}
    return shapes, tied


def adapter_shapes(weights: NamedTensors, *, rank: int, expected: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Return names and shapes of both matrices of each layer that an adapter's tensors name.

    Args:
        weights: `base_model.model.<layer>.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank], as in peft.
        expected: the shapes of the model.
    """
    shapes = {}
    for name, _ in weights:
        prefix = name.rpartition(".lora_")[0]
        if out_in := expected.get(f"{prefix.removeprefix('base_model.model.')}.weight"):
            shapes[f"{prefix}.lora_A.weight"] = torch.Size((rank, out_in[-1]))
            shapes[f"{prefix}.lora_B.weight"] = torch.Size((out_in[0], rank))
    return shapes


def check_names_and_shapes(weights: NamedTensors, *, expected: Mapping[str, torch.Size], optional: set[str]) -> None:
    """Raise DistillError naming what differs: a wrong tensor in the middle of a load would break the engine."""
    given = {name: tensor.shape for name, tensor in weights}
    problems = [f"{name} is not a parameter of the model" for name in given.keys() - expected.keys()]
    problems += [f"{name} is missing" for name in expected.keys() - given.keys() - optional]
    problems += [
        f"{name} has shape {list(given[name])}, the engine's is {list(expected[name])}"
        for name in given.keys() & expected.keys()
        if given[name] != expected[name]
    ]
    if len(given) != len(weights):
        problems.append("a name is given twice")
    if problems or not weights:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        what = "; ".join(sorted(problems)[:3]) or "there are no tensors"
        raise DistillError(f"weights refused, the engine keeps its own: {what}{more}")


def full_tensors(weights: NamedTensors, *, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather one parameter after another. A collective for DTensors: every rank iterates over all, in the same order.

    Matrices are cast to `dtype`, if given, before they are gathered: half as many bytes travel to a 16-bit engine.
    Vectors and scalars are not: vLLM keeps some of them (a router's bias) in float32, and casts the others itself.
    """
    for name, tensor in weights:
        tensor = tensor.make() if isinstance(tensor, Deferred) else tensor.detach()
        if dtype is not None and tensor.ndim > 1:
            tensor = tensor.to(dtype)
        yield name, whole(tensor)  # collective


def whole(param: torch.Tensor) -> torch.Tensor:
    """Return the full parameter on its mesh's device, detached. A collective for DTensors."""
    if not isinstance(param, DTensor):
        return param.detach()
    on_mesh: Any = param.detach().to(param.device_mesh.device_type)
    return on_mesh.full_tensor()


def whole_tensors(weights: NamedTensors) -> dict[str, torch.Tensor]:
    """Return copies of all tensors in host memory, as an adapter is small. A collective for DTensors."""
    # vLLM scales B in place
    return {name: tensor.to("cpu", copy=True) for name, tensor in full_tensors(weights, dtype=None)}
