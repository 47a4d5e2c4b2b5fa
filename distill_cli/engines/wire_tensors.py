"""Tensors of any floating type in the bodies of a scoring server; the type is a part of the tensor's name."""

from collections.abc import Mapping

import numpy
import torch

from distill_cli.engines.wire import Arrays, BadBody
from distill_cli.types import ModelHead

FLOATS = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def named_array(name: str, tensor: torch.Tensor) -> Arrays:
    """Return a tensor as an array under its full name."""
    array = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return {f"{name}.{str(tensor.dtype)[6:]}": array.numpy()}


def find_tensor(arrays: Arrays, name: str, *, num_dims: int) -> torch.Tensor | None:
    """Return the tensor with this name, of whatever type; None if there is none. Raises BadBody if it is damaged."""
    for dtype_name, dtype in FLOATS.items():
        array = arrays.get(f"{name}.{dtype_name}")
        if array is None:
            continue
        expected = numpy.uint16 if dtype == torch.bfloat16 else getattr(numpy, dtype_name)
        if array.dtype != expected or array.ndim != num_dims:
            raise BadBody(f"{name} is {array.dtype.name} of shape {list(array.shape)}")
        found = torch.from_numpy(array)
        return found.view(dtype) if dtype == torch.bfloat16 else found
    return None


def head_arrays(head: ModelHead) -> tuple[Arrays, dict[str, str]]:
    """Return the tensors and the metadata of an answer of /head."""
    arrays = named_array("weight", head.weight) | ({} if head.bias is None else named_array("bias", head.bias))
    return arrays, {"scale": repr(head.scale), "soft_cap": repr(head.soft_cap or 0.0)}


def parse_head(arrays: Arrays, metadata: Mapping[str, str]) -> ModelHead:
    """Return the head in an answer of /head. Raises BadBody."""
    weight, bias = find_tensor(arrays, "weight", num_dims=2), find_tensor(arrays, "bias", num_dims=1)
    if weight is None or (bias is not None and (len(bias), bias.dtype) != (len(weight), weight.dtype)):
        raise BadBody(f"no head: the tensors are {', '.join(sorted(arrays)) or 'none'}")
    try:
        return ModelHead(weight, bias, float(metadata["scale"]), float(metadata["soft_cap"]) or None)
    except (KeyError, ValueError) as error:
        raise BadBody(f"no head: {error!r:.80}") from error
