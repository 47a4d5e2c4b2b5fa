"""Merged tokens (`model.eos_map`), compared with dense float64 distributions in which their probabilities add up."""

import pytest
import torch

from distill_cli.losses.distill_loss import TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.merged_eos import merge_topk
from distill_cli.types import TeacherScores
from tests.losses.reference import HeadLoss, divergence, topk_of

TOKENS, HIDDEN, VOCAB, TOPK = 9, 6, 30, 8
ENDS = (4, 17, 25)
"""The first stands for all."""


def add_up(p_NV: torch.Tensor) -> torch.Tensor:
    """The distribution in which the end tokens are one class."""
    others = [token for token in range(VOCAB) if token not in ENDS]
    merged_NV = torch.zeros_like(p_NV)
    merged_NV[:, others] = p_NV[:, others]
    merged_NV[:, ENDS[0]] = p_NV[:, list(ENDS)].sum(-1)
    return merged_NV


def make_pair(*, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, and the teacher's logits, with ends that are likely, unlikely, and in part."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH, weight_VH = (torch.randn(size, HIDDEN, generator=generator).double() for size in (TOKENS, VOCAB))
    teacher_NV = (torch.randn(TOKENS, VOCAB, generator=generator) * 2).double()
    teacher_NV[:3, list(ENDS)] = torch.tensor([5.0, 6.0, 4.0]).double()  # all among the top-k
    teacher_NV[3, list(ENDS)] = torch.tensor([7.0, -9.0, -9.0]).double()  # one is
    teacher_NV[4, list(ENDS)] = -9.0  # none is
    return hidden_NH, weight_VH, teacher_NV


def topk_scores(teacher_NV: torch.Tensor, topk: int) -> TeacherScores:
    logp_NK, ids_NK = teacher_NV.log_softmax(-1).topk(topk)
    return TeacherScores.of_topk(ids_NK.int(), logp_NK, teacher_NV.log_softmax(-1)[:, ENDS[1]])


def run(scores: TeacherScores, hidden: torch.Tensor, weight: torch.Tensor, loss: DistillLoss, temperature: float = 1.0):
    return linear_divergence(
        hidden,
        Head(weight),
        topk_of(scores.topk_ids, scores.topk_logp),
        HeadLoss(loss),
        sampled_ids_N=torch.full((TOKENS,), ENDS[1]),
        with_classes=True,
        temperature=temperature,
        chunk_tokens=4,
        merged_eos_ids=ENDS,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl_type", sorted(DIVERGENCES))
def test_full_support_equals_the_merged_divergence(kl_type, temperature) -> None:
    hidden, weight, teacher_NV = make_pair()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    scores = merge_topk(topk_scores(teacher_NV / temperature, VOCAB), sampled_ids=[0] * TOKENS, merged_eos_ids=ENDS)
    out = run(scores, hidden, weight, DistillLoss(kl_type=kl_type), temperature)
    found = torch.autograd.grad(out.loss, (hidden, weight))
    q_NV = add_up((hidden @ weight.T / temperature).softmax(-1))
    p_NV = add_up((teacher_NV / temperature).softmax(-1))
    kept = [token for token in range(VOCAB) if token not in ENDS[1:]]
    loss_N = divergence(kl_type, p_NV[:, kept], q_NV[:, kept], kl_weight=0.5, skew=0.1)
    expected = torch.autograd.grad(loss_N.sum(), (hidden, weight))
    torch.testing.assert_close(out.loss_N, loss_N, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    sampled_logp_N = (hidden @ weight.T).log_softmax(-1)[:, ENDS[1]]  # the token's own, as the sampler reports it
    torch.testing.assert_close(out.sampled_logp_N, sampled_logp_N)
    torch.testing.assert_close(out.entropy_N, -torch.xlogy(q_NV, q_NV).sum(-1))
    assert out.argmax_N.equal(q_NV.argmax(-1))


@pytest.mark.parametrize("tail", TAILS)
def test_equal_end_probability_is_zero_loss(tail: str) -> None:
    hidden, weight, _ = make_pair()
    student_NV = hidden @ weight.T
    teacher_NV = student_NV.clone()
    teacher_NV[:, ENDS[0]], teacher_NV[:, ENDS[1]] = student_NV[:, ENDS[1]], student_NV[:, ENDS[0]]
    scores = merge_topk(topk_scores(teacher_NV, VOCAB), sampled_ids=[0] * TOKENS, merged_eos_ids=ENDS)
    loss = DistillLoss(kl_type="mixed", tail=tail)
    merged = run(scores, hidden, weight, loss).loss_N
    if tail == "zero":  # the places that became free are outside the top-k, where it has a price of its own
        assert merged.abs().max() < 1e-6
    else:
        torch.testing.assert_close(merged, torch.zeros(TOKENS).double(), rtol=0, atol=1e-9)


def test_ends_outside_the_topk_stay_outside() -> None:
    hidden, weight, teacher_NV = make_pair()
    scores = merge_topk(topk_scores(teacher_NV, TOPK), sampled_ids=[ENDS[1]] * TOKENS, merged_eos_ids=ENDS)
    p_NV = add_up(teacher_NV.softmax(-1))
    assert (scores.topk_ids[:3] == ENDS[0]).sum() == 3
    assert (scores.topk_ids[:3] < 0).sum() == 6  # two places of each became free
    assert (scores.topk_ids[4] == ENDS[0]).sum() == 0
    assert scores.topk_logp.diff(dim=-1).le(0).all()
    in_topk = scores.topk_ids[:3] == ENDS[0]
    torch.testing.assert_close(scores.topk_logp[:3][in_topk].exp(), p_NV[:3, ENDS[0]])
    torch.testing.assert_close(scores.sampled_logp[:3].exp(), p_NV[:3, ENDS[0]])
    out = run(scores, hidden, weight, DistillLoss(kl_type="forward"))
    q_NV = add_up((hidden @ weight.T).softmax(-1))
    ids = scores.topk_ids[4].long()
    p, q = (torch.cat([x[4, ids], 1 - x[4, ids].sum()[None]]) for x in (p_NV, q_NV))
    torch.testing.assert_close(out.loss_N[4], divergence("forward", p, q, kl_weight=0.5, skew=0.1))


def test_nothing_changes_without_a_class() -> None:
    scores = topk_scores(make_pair()[2], TOPK)
    assert merge_topk(scores, sampled_ids=[0] * TOKENS, merged_eos_ids=()) is scores
