"""The student's weights into its engine: checked by name and shape first, then copied one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distill_cli.errors import DistillError


@dataclass(frozen=True)
class Deferred:
    """A weight that is made when its turn comes, so that one of them is there at a time."""

    shape: torch.Size
    make: Callable[[], torch.Tensor]
    """A collective where it gives a DTensor."""


NamedTensors = Sequence[tuple[str, torch.Tensor | Deferred]]


def expected_shapes(hf_config: Any, *, trust_remote_code: bool) -> tuple[dict[str, torch.Size], set[str]]:
    """Names and shapes of a model's parameters, as transformers has them, and the names that may be left out.

    The latter are those tied to another parameter. Nothing is allocated.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = shapes.keys() - {name for name, _ in model.named_parameters()}
    return shapes, tied


def check_names_and_shapes(weights: NamedTensors, *, expected: Mapping[str, torch.Size], optional: set[str]) -> None:
    """Raise DistillError naming what differs: a wrong one in the middle of a load would ruin the engine for good."""
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
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DistillError(f"weights refused, the engine keeps its own: {'; '.join(sorted(problems)[:3])}{more}")


def full_tensors(weights: NamedTensors, *, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather one parameter after the other; a collective for DTensors: every rank goes through all, in the same order.

    Matrices are cast before they are gathered, so that half as many bytes travel to a 16-bit engine; vectors and
    scalars are not, since vLLM keeps some of them (a router's bias) in float32, and casts the others itself.
    """
    for name, tensor in weights:
        tensor = tensor.make() if isinstance(tensor, Deferred) else tensor.detach()
        if tensor.ndim > 1:
            tensor = tensor.to(dtype)
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # collective
        yield name, tensor
