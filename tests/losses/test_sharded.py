"""A vocabulary sharded over two gloo ranks gives what the whole one gives."""

from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distill_cli.losses.distill_loss import PADDING_LOGP, TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.linear_topk import HeadOutput, linear_topk_loss

TOKENS, HIDDEN, VOCAB, TOPK, RANKS = 11, 8, 60, 5, 2
MERGED_EOS_IDS = {"bucket": (), "renormalize": (59, 3), "zero": (2, 40, 41)}
"""On both shards, the first on either."""


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double()
    weight[50] = weight[10]  # ties between the shards, which the smaller id wins
    hidden[0] = 3 * weight[10]
    logp, ids = torch.randn(TOKENS, VOCAB).double().mul(2).log_softmax(-1).topk(TOPK)
    ids[2, 3:], logp[2, 3:] = -1, PADDING_LOGP
    return hidden, weight, ids, logp


def run_head(
    kl_type: str, tail: str, *, rank: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[HeadOutput, torch.Tensor, torch.Tensor]:
    """The head on the whole weight, or on `rank`'s shard of it: outputs, and gradients of hidden states and weight."""
    hidden, weight, ids, logp = make_inputs()
    if group is not None:
        weight = weight.chunk(RANKS)[rank]
    hidden, weight = hidden.requires_grad_(), weight.clone().requires_grad_()
    loss = DistillLoss(kl_type=kl_type, tail=tail)
    output = linear_topk_loss(
        hidden,
        weight,
        ids,
        lambda q, entropy, rows: loss(logp[rows], q, entropy),
        sampled_ids_N=torch.arange(0, 5 * TOKENS, 5),
        temperature=0.8 if tail == "zero" else 1.0,
        group=group,
        chunk_tokens=4,
        merged_eos_ids=MERGED_EOS_IDS[tail],
    )
    output.loss.backward()
    return output, hidden.grad, weight.grad


def compare_on_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for kl_type in DIVERGENCES:
        for tail in TAILS:
            whole, whole_grad_hidden, whole_grad_weight = run_head(kl_type, tail)
            output, grad_hidden, grad_weight = run_head(kl_type, tail, rank=rank, group=dist.group.WORLD)
            dist.all_reduce(grad_hidden)
            close = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda text, case=(kl_type, tail): f"{case}: {text}"}
            for field in fields(output):
                torch.testing.assert_close(getattr(output, field.name), getattr(whole, field.name), **close)
            torch.testing.assert_close(grad_hidden, whole_grad_hidden, **close)
            torch.testing.assert_close(grad_weight, whole_grad_weight.chunk(RANKS)[rank], **close)
            assert output.argmax_N[0] == 10
    dist.destroy_process_group()


def test_two_shards_equal_the_whole(tmp_path: Path) -> None:
    mp.spawn(compare_on_rank, args=(str(tmp_path / "rendezvous"),), nprocs=RANKS)
