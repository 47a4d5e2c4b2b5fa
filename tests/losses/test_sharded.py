"""A vocabulary sharded over two gloo ranks gives what the whole one gives."""

import itertools
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distill_cli.losses.distill_loss import PADDING_LOGP, TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.logit_transform import IDENTITY, LogitTransform

from .reference import HeadLoss, topk_of

TOKENS, HIDDEN, VOCAB, TOPK, RANKS = 11, 8, 60, 5, 2
MERGED_EOS_IDS = {"bucket": (), "renormalize": (59, 3), "zero": (2, 40, 41)}
"""On both shards, the first on either."""
TRANSFORMS = (IDENTITY, LogitTransform(scale=0.3), LogitTransform(scale=0.3, soft_cap=5.0))
"""All but the identity with a bias."""


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double()
    weight[50] = weight[10]  # ties between the shards, which the smaller id wins
    hidden[0] = 3 * weight[10]
    logp, ids = torch.randn(TOKENS, VOCAB).double().mul(2).log_softmax(-1).topk(TOPK)
    ids[2, 3:], logp[2, 3:] = -1, PADDING_LOGP
    bias = torch.linspace(-1, 1, VOCAB).double()
    bias[50] = bias[10]
    return hidden, weight, bias, ids, logp


def run_head(
    kl_type: str, tail: str, transform: LogitTransform, *, rank: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[HeadOutput, torch.Tensor, torch.Tensor]:
    """The head on the whole vocabulary, or on `rank`'s shard of it.

    Returns outputs, the gradient of the hidden states, and that of the weight with the bias's as its last column.
    """
    hidden, weight, bias, ids, logp = make_inputs()
    if group is not None:
        weight, bias = weight.chunk(RANKS)[rank], bias.chunk(RANKS)[rank]
    hidden, weight, bias = hidden.requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
    is_plain = transform == IDENTITY
    loss = DistillLoss(kl_type=kl_type, tail=tail)
    output = linear_divergence(
        hidden,
        Head(weight, None if is_plain else bias, transform),
        topk_of(ids, logp),
        HeadLoss(loss),
        sampled_ids_N=torch.arange(0, 5 * TOKENS, 5),
        with_classes=True,
        temperature=0.8 if tail == "zero" else 1.0,
        group=group,
        chunk_tokens=4,
        merged_eos_ids=MERGED_EOS_IDS[tail],
    )
    output.loss.backward()
    grad_bias = torch.zeros_like(bias) if is_plain else bias.grad
    return output, hidden.grad, torch.cat([weight.grad, grad_bias[:, None]], dim=-1)


def compare_on_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for kl_type, tail, transform in itertools.product(DIVERGENCES, TAILS, TRANSFORMS):
        whole, whole_grad_hidden, whole_grad_head = run_head(kl_type, tail, transform)
        output, grad_hidden, grad_head = run_head(kl_type, tail, transform, rank=rank, group=dist.group.WORLD)
        dist.all_reduce(grad_hidden)
        case = (kl_type, tail, transform)
        close = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda text, case=case: f"{case}: {text}"}
        for field in fields(output):
            torch.testing.assert_close(getattr(output, field.name), getattr(whole, field.name), **close)
        torch.testing.assert_close(grad_hidden, whole_grad_hidden, **close)
        torch.testing.assert_close(grad_head, whole_grad_head.chunk(RANKS)[rank], **close)
        assert output.argmax_N[0] == 10
    dist.destroy_process_group()


def test_two_shards_equal_the_whole(tmp_path: Path) -> None:
    mp.spawn(compare_on_rank, args=(str(tmp_path / "rendezvous"),), nprocs=RANKS)
