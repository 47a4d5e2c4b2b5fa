"""Model FLOPs utilization: the FLOPs of training relative to the device's peak.

Training needs 6 floating-point operations per parameter and token (2 forward, 4 backward; PaLM, Chowdhery et al. 2022,
appendix B), 4 for a frozen parameter, which has no gradient; the head's only at response tokens, since no other
position reaches it. Of a layer's experts only those count that compute a token. Attention's own and recomputed
operations are left out, so the figure errs low.
"""

from typing import Any

import torch
from torch import nn

from distill_cli.models.traits import Traits
from distill_cli.student.model import Student

PEAK_BF16_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bfloat16 operations per second in NVIDIA's data sheets, by a part of the device's name."""


def train_flops(student: Student, *, num_tokens: int, num_response_tokens: int) -> float:
    """Return the operations of a forward and a backward pass of all ranks; a sharded parameter counts whole."""
    head = student.lm.get_output_embeddings().weight
    embedding = student.lm.get_input_embeddings().weight
    tables = {id(head), id(embedding)}
    share = _active_shares(student.lm)
    body = sum(
        _flops(param) * share.get(id(param), 1.0) for param in student.lm.parameters() if id(param) not in tables
    )
    return body * num_tokens + _flops(head) * num_response_tokens


def _active_shares(lm: nn.Module) -> dict[int, float]:
    """Return the share of each stacked expert parameter, by its id, that computes a token."""
    config: Any = lm.config
    experts = Traits.of(config.to_dict()).experts
    if experts is None:
        return {}
    holders = (module for module in lm.modules() if getattr(module, "num_experts", None))
    stacked = (param for module in holders for param in module.parameters(recurse=False) if param.ndim == 3)
    return {id(param): experts.per_token / experts.number for param in stacked}


def _flops(param: torch.Tensor) -> float:
    """Return the operations per token."""
    return (6.0 if param.requires_grad else 4.0) * param.numel()


def peak_flops(device: torch.device) -> float | None:
    """Return a device's operations per second; None for a CPU, or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
