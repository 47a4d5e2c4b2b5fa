"""Time the fused head at a real vocabulary against its three bare matrix products; measure its memory and error.

The products are the plain head's logits and the gradients of hidden states and weight, one call each in the inputs'
dtype. `bench_loss.py` makes the inputs and has the plain head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_loss import fused, make_inputs, materialised

from distill_cli.losses.distill_loss import DistillLoss
from gpu_stages.figures import Stage
from gpu_stages.timing import alternating_seconds, most_expensive, peak_bytes

SIZES = {"tokens": 8_192, "vocab": 151_936, "hidden": 2_048, "topk": 64}
REHEARSED = {"tokens": 256, "vocab": 5_000, "hidden": 64, "topk": 16}
CHECKED_TOKENS = 256


def run(stage: Stage) -> None:
    sizes, dtype = (REHEARSED, torch.float32) if stage.rehearse else (SIZES, torch.bfloat16)
    inputs = make_inputs(sizes, device=stage.device, dtype=dtype)
    hidden_NH, weight_VH, ids_NK, teacher_NK = inputs
    loss = DistillLoss(kl_type="mixed")

    def ours() -> None:
        hidden_NH.grad = weight_VH.grad = None
        fused(*inputs, loss).backward()

    seconds = time_against_products(ours, hidden_NH, weight_VH, device=stage.device, rounds=3 if stage.rehearse else 10)
    hidden_NH.grad = weight_VH.grad = None
    peak = peak_bytes(ours, device=stage.device)
    stage.record("fused head, forward and backward", seconds["ours"] * 1e3, "ms")
    stage.record("its three bare products", seconds["bare"] * 1e3, "ms")
    stage.record("products' time over the head's", seconds["bare"] / seconds["ours"] * 100, "%", at_least=85)
    stage.record("fused head, peak memory", peak / 2**20, "MiB")
    stage.record("the weight's float32 gradient alone", weight_VH.numel() * 4 / 2**20, "MiB")
    stage.table("kernels", most_expensive(ours, device=stage.device))
    with torch.no_grad():
        some = hidden_NH[:CHECKED_TOKENS], weight_VH, ids_NK[:CHECKED_TOKENS], teacher_NK[:CHECKED_TOKENS]
        exact = materialised(some[0].double(), weight_VH.double(), some[2], some[3].double(), loss)
        off = abs(float(fused(*some, loss) / exact) - 1)
    stage.record("loss off a plain float64 one", off, at_most=1e-4, wrong_if_missed=True)


def time_against_products(
    ours: Callable[[], None], hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, device: str, rounds: int
) -> dict[str, float]:
    """Return median seconds of `ours` and of the `bare` products, measured in alternation."""
    logits_NV = torch.randn(len(hidden_NH), len(weight_VH), device=device).to(hidden_NH.dtype)

    @torch.no_grad()
    def products() -> list[torch.Tensor]:
        return [hidden_NH @ weight_VH.t(), logits_NV @ weight_VH, logits_NV.t() @ hidden_NH]

    return alternating_seconds({"ours": ours, "bare": products}, device=device, rounds=rounds)
