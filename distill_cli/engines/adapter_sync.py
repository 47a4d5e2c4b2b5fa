"""The student's adapter into its engine, from tensors in memory: vLLM's own way in is a folder on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distill_cli.engines.vllm_patches import ADAPTER_ID
from distill_cli.engines.weight_sync import Deferred, NamedTensors
from distill_cli.errors import DistillError


def adapter_request() -> Any:
    """-> `vllm.LoRARequest` for what `load_adapter` loaded; no folder is behind it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("student", ADAPTER_ID, "memory")


def check_adapter(weights: NamedTensors, *, rank: int, expected: Mapping[str, torch.Size]) -> None:
    """Raise DistillError naming what does not fit the engine's model, whose shapes `expected` are.

    Args:
        weights: `base_model.model.<layer>.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank], as peft has it.
    """
    given = {name: tuple(tensor.shape) for name, tensor in weights}
    problems = []
    for name, shape in given.items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        out_in = expected.get(f"{layer}.weight")
        wanted = {"A.weight": (rank, out_in[-1]), "B.weight": (out_in[0], rank)}.get(part) if out_in else None
        if shape != wanted:
            problems.append(f"{name} has shape {list(shape)}, the engine's is {list(wanted) if wanted else 'none'}")
        other = name.replace(".lora_A.", ".lora_B.") if part.startswith("A") else name.replace(".lora_B.", ".lora_A.")
        if other not in given:
            problems.append(f"{other} is missing")
    if problems or not given:
        what = "; ".join(sorted(problems)[:3]) or "there are no tensors"
        raise DistillError(f"adapter refused, the engine keeps its own: {what}")


def whole_tensors(weights: NamedTensors) -> dict[str, torch.Tensor]:
    """Copies of all of them in host memory: an adapter is small. A collective for DTensors."""
    found = {}
    for name, tensor in weights:
        assert not isinstance(tensor, Deferred), name
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # collective
        found[name] = tensor.to("cpu", copy=True)  # vLLM scales B in place
    return found
