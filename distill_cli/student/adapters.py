"""Low-rank adapters (LoRA) on frozen weights: add them by peft, initialise them, merge them for the sampler.

peft replaces each targeted layer by one of its own, with the frozen weight at `<name>.base_layer.weight` and the
adapter at `<name>.lora_A.default.weight` [rank, in] and `<name>.lora_B.default.weight` [out, rank]; the layer computes
W x + alpha / rank B A x. There is no dropout: its mask would depend on how the work is split over ranks.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from distill_cli.engines.weight_sync import Deferred, whole
from distill_cli.errors import ConfigError
from distill_cli.models.lora_names import targeted

A, B = "lora_A.default.weight", "lora_B.default.weight"


def add_adapters(
    lm: PreTrainedModel, *, rank: int, alpha: float = 32.0, targets: Sequence[str] | None = None, bf16: bool
) -> None:
    """Freeze the model and add adapters to it, in place; `load_weights` fills both.

    Args:
        alpha: scale the adapter's output by alpha / rank.
        targets: ends of the names of the layers that get an adapter; None is every linear layer of the decoder.
        bf16: keep the frozen weights in bfloat16, if the student computes in it.

    Raises:
        ConfigError: a target is not a linear layer.
    """
    import peft  # takes seconds, and only adapters need it

    names = list(targeted({name: tuple(param.shape) for name, param in lm.named_parameters()}, targets))
    for name in names:
        if not isinstance(layer := lm.get_submodule(name), nn.Linear):
            what = f"{name} is a {type(layer).__name__}, not a linear layer"
            raise ConfigError(f"model.student.lora.targets: {what}; name others")
    scaling: Any = alpha  # peft declares int
    # In a model that has a config peft takes the names of shared experts for those of experts, which have other names
    # in transformers 4, and gives the experts adapters.
    holder = nn.ModuleDict({"lm": lm})
    settings = peft.LoraConfig(r=rank, lora_alpha=scaling, target_modules=[f"lm.{name}" for name in names], bias="none")
    peft.inject_adapter_in_model(settings, holder, low_cpu_mem_usage=True)
    adapted = {name.removesuffix(f".{A}") for name, _ in lm.named_parameters() if name.endswith(A)}
    assert adapted == set(names), adapted ^ set(names)
    for param in lm.parameters():
        if bf16 and not param.requires_grad:
            param.data = param.data.to(torch.bfloat16)


def rank_of(lm: PreTrainedModel) -> int:
    """Return the rank of the model's adapters, or 0 if it has none."""
    return next((param.shape[0] for name, param in lm.named_parameters() if name.endswith(A)), 0)


def is_adapter(name: str) -> bool:
    """Whether the name is that of an adapter's parameter."""
    return name.endswith((A, B))


def plain_name(name: str) -> str:
    """Return a frozen parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def exported_name(name: str, stored: Callable[[str], str] = str) -> str:
    """Return an adapter parameter's name in a folder that peft and vLLM load.

    Args:
        stored: returns the name in the checkpoint of a layer's weight (`Published.name_of`).
    """
    layer = next(name.removesuffix(end) for end in (A, B) if name.endswith(end))
    end = name.removeprefix(layer).replace(".default.", ".")
    return f"base_model.model.{stored(f'{layer}weight').removesuffix('weight')}{end}"


def initial_value(name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """Return an adapter parameter's initial value, distributed as peft's: B is 0, A uniform within 1 / sqrt(in).

    It depends on name, shape and seed alone, so that every layout starts from the same values.
    """
    if name.endswith(B):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged_parameters(lm: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor | Deferred]]:
    """Yield each parameter of the model without adapters, under its name there, with its adapter merged.

    A merged one, W + alpha / rank B A in float32, is `Deferred`, laid out as W; computing it is a collective.
    """
    params = dict(lm.named_parameters())
    for name, param in params.items():
        layer = name.removesuffix("base_layer.weight")
        if layer != name:
            adapted: Any = lm.get_submodule(layer.removesuffix("."))
            make = partial(merge, param, params[layer + A], params[layer + B], adapted.scaling["default"])
            yield plain_name(name), Deferred(param.shape, make)
        elif not is_adapter(name):
            yield plain_name(name), param


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return weight + scale b a in float32, detached, laid out as `weight` (on the mesh's device).

    A collective for DTensors.
    """
    weight, a, b = weight.detach(), whole(a), whole(b)
    if not isinstance(weight, DTensor):
        return torch.addmm(weight.float(), b, a, alpha=scale)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    rows, columns = (slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
    local = weight.to_local().to(a.device, torch.float32)
    local = torch.addmm(local, b[rows], a[:, columns], alpha=scale) if local.numel() else local
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
