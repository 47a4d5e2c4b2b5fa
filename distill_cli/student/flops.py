"""Model FLOPs utilization: the arithmetic that training needs, over what the device could have done meanwhile.

Needed are 6 floating-point operations a parameter and token (2 forward, 4 backward; PaLM, Chowdhery et al. 2022,
appendix B), 4 for one that is frozen and has no gradient of its own; the head's only at response tokens, since no other
position reaches it. Attention's own and whatever is
recomputed are left out, so the figure errs low.
"""

from __future__ import annotations

import torch

from distill_cli.student.model import Student

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}
"""Dense bfloat16 operations a second of NVIDIA's data sheets, by what the device's name contains."""


def train_flops(student: Student, *, num_tokens: int, num_response_tokens: int) -> float:
    """Operations of a forward and a backward pass of all ranks together; a sharded parameter counts whole."""
    head = student.lm.get_output_embeddings().weight
    embedding = student.lm.get_input_embeddings().weight
    tables = {id(head), id(embedding)}
    body = sum(_flops(param) for param in student.lm.parameters() if id(param) not in tables)
    return body * num_tokens + _flops(head) * num_response_tokens


def _flops(param: torch.Tensor) -> float:
    """Of one token."""
    return (6.0 if param.requires_grad else 4.0) * param.numel()


def peak_flops(device: torch.device) -> float | None:
    """Of one device; None for a CPU, or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
