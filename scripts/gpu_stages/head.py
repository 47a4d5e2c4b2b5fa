"""The fused head at a real vocabulary: time against its three bare matrix products, peak memory, and its value.

The products are those of the plain head: logits, and the gradients of hidden states and weight, each as one call in the
inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from distill_cli.losses.divergence import DistillLoss
from distill_cli.losses.linear_topk import linear_topk_loss
from gpu_stages.figures import Stage
from gpu_stages.timing import alternating_seconds, most_expensive, peak_bytes

CHECKED_TOKENS = 256


def run(stage: Stage) -> None:
    tokens, vocab, hidden, topk = (256, 5_000, 64, 16) if stage.rehearse else (8_192, 151_936, 2_048, 64)
    dtype = torch.float32 if stage.rehearse else torch.bfloat16
    device = stage.device
    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, device=device).mul_(2 / hidden**0.5).to(dtype).requires_grad_()
    first_N1 = torch.randint(vocab, (tokens, 1), device=device)
    ids_NK = (first_N1 + torch.arange(topk, device=device) * (vocab // topk)) % vocab
    teacher_NK = torch.randn(tokens, topk + 1, device=device).mul_(2).log_softmax(-1)[:, :-1]
    loss = DistillLoss(kl_type="mixed")

    def value(num_tokens: int) -> torch.Tensor:
        return linear_topk_loss(
            hidden_NH[:num_tokens],
            weight_VH,
            ids_NK[:num_tokens],
            lambda logp, entropy, rows: loss(teacher_NK[:num_tokens][rows], logp, entropy) / num_tokens,
            sampled_ids_N=ids_NK[:num_tokens, 0],
        ).loss

    def fused() -> None:
        hidden_NH.grad = weight_VH.grad = None
        value(tokens).backward()

    seconds = time_against_products(fused, hidden_NH, weight_VH, device=device, rounds=3 if stage.rehearse else 10)
    hidden_NH.grad = weight_VH.grad = None
    peak = peak_bytes(fused, device=device)
    stage.record("fused head, forward and backward", seconds["ours"] * 1e3, "ms")
    stage.record("its three bare products", seconds["bare"] * 1e3, "ms")
    stage.record("products' time over the head's", seconds["bare"] / seconds["ours"] * 100, "%", at_least=85)
    stage.record("fused head, peak memory", peak / 2**20, "MiB")
    stage.record("the weight's float32 gradient alone", vocab * hidden * 4 / 2**20, "MiB")
    stage.table("kernels", most_expensive(fused, device=device))
    ours = float(value(CHECKED_TOKENS))
    some = slice(CHECKED_TOKENS)
    exact = materialised(hidden_NH[some], weight_VH, ids_NK[some], teacher_NK[some], loss)
    stage.record("loss off a plain float64 one", abs(ours / exact - 1), at_most=1e-4, wrong_if_missed=True)


def time_against_products(
    fused: Callable[[], None], hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, device: str, rounds: int
) -> dict[str, float]:
    """Seconds of `ours` and of the `bare` products, which take turns."""
    logits_NV = torch.randn(len(hidden_NH), len(weight_VH), device=device).to(hidden_NH.dtype)

    @torch.no_grad()
    def products() -> list[torch.Tensor]:
        return [hidden_NH @ weight_VH.t(), logits_NV @ weight_VH, logits_NV.t() @ hidden_NH]

    return alternating_seconds({"ours": fused, "bare": products}, device=device, rounds=rounds)


@torch.no_grad()
def materialised(hidden_NH, weight_VH, ids_NK, teacher_NK, loss: DistillLoss) -> float:
    """The mean loss by float64 logits of the whole vocabulary."""
    logp_NV = (hidden_NH.double() @ weight_VH.double().t()).log_softmax(-1)
    logp_NK = logp_NV.gather(1, ids_NK)
    rest_N1 = (1 - logp_NK.exp().sum(-1, keepdim=True)).log()
    return float(loss(teacher_NK.double(), torch.cat([logp_NK, rest_N1], dim=-1), rest_N1[:, 0]).mean())
