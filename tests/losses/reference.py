"""Every divergence and tail once more: dense, in float64, from probabilities, and sharing no code with the package.

Shape letters: N tokens, K top-k, V vocabulary, C classes.
"""

import math
from dataclasses import dataclass

import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.teacher_chunk import TopK
from distill_cli.losses.token_loss import Tokens


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def divergence(kl_type: str, p: torch.Tensor, q: torch.Tensor, *, kl_weight: float, skew: float) -> torch.Tensor:
    w, a = kl_weight, skew
    if kl_type == "forward":
        return kl(p, q)
    if kl_type == "reverse":
        return kl(q, p)
    if kl_type == "mixed":
        return w * kl(p, q) + (1 - w) * kl(q, p)
    if kl_type == "jsd":
        m = w * p + (1 - w) * q
        return w * kl(p, m) + (1 - w) * kl(q, m)
    if kl_type == "skew_forward":
        return kl(p, a * p + (1 - a) * q)
    if kl_type == "skew_reverse":
        return kl(q, (1 - a) * p + a * q)
    if kl_type == "l1":
        return (p - q).abs().sum(-1)
    raise NotImplementedError(f"a divergence without a reference: {kl_type}")


def classes(
    tail: str, p_NK: torch.Tensor, q_NV: torch.Tensor, ids_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two distributions that `tail` compares. Ids below 0 are no classes."""
    real_NK = ids_NK >= 0
    index_NK = ids_NK.clamp_min(0)
    p_NK, q_NK = (torch.where(real_NK, x_NK, 1e-300) for x_NK in (p_NK, q_NV.gather(1, index_NK)))
    in_topk_NV = torch.zeros(q_NV.shape).scatter_add(1, index_NK, real_NK.float()) > 0
    if tail == "bucket":
        p_rest_N1 = 1 - p_NK.sum(-1, keepdim=True)
        q_rest_N1 = q_NV.masked_fill(in_topk_NV, 0).sum(-1, keepdim=True)
        return torch.cat([p_NK, p_rest_N1], -1), torch.cat([q_NK, q_rest_N1], -1)
    p_NK = p_NK / p_NK.sum(-1, keepdim=True)
    if tail == "renormalize":
        return p_NK, q_NK / q_NK.sum(-1, keepdim=True)
    zeros_NV = torch.full_like(q_NV, math.exp(-100)).masked_fill(in_topk_NV, 0)
    return zeros_NV.scatter_add(1, index_NK, p_NK), q_NV


@dataclass(frozen=True)
class Case:
    """Random student logits, and a teacher's top-k whose ids reach anywhere."""

    logits_NV: torch.Tensor
    teacher_logp_NK: torch.Tensor
    """float32"""
    ids_NK: torch.Tensor


def make_case(
    *, tokens: int = 12, vocab: int = 40, topk: int = 6, seed: int = 0, closeness: float = 0.7, scale: float = 2.0
) -> Case:
    """A student that agrees with its teacher as far as `closeness` (1: wholly). The teacher knows its own top-k."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV, noise_NV = (torch.randn(2, tokens, vocab, generator=generator) * scale).double()
    student_NV = teacher_NV if closeness == 1 else closeness * teacher_NV + (1 - closeness) * noise_NV
    logp_NK, ids_NK = teacher_NV.log_softmax(-1).topk(topk)
    return Case(logits_NV=student_NV, teacher_logp_NK=logp_NK.float(), ids_NK=ids_NK)


def reference_loss(
    case: Case,
    logits_NV: torch.Tensor,
    *,
    kl_type: str,
    tail: str,
    kl_weight: float = 0.5,
    skew: float = 0.1,
) -> torch.Tensor:
    """float64 [N], differentiable in `logits_NV`, which are already divided by the temperature."""
    q_NV = logits_NV.double().softmax(-1)
    p_NC, q_NC = classes(tail, case.teacher_logp_NK.double().exp(), q_NV, case.ids_NK)
    return divergence(kl_type, p_NC, q_NC, kl_weight=kl_weight, skew=skew)


def student_classes(
    logits_NV: torch.Tensor, ids_NK: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head would hand to a loss: log-probabilities of the top-k and the rest [N, K + 1], and entropy [N]."""
    logp_NV = logits_NV.double().log_softmax(-1)
    in_topk_NV = torch.zeros(logp_NV.shape).scatter(1, ids_NK, 1.0) > 0
    rest_N1 = logp_NV.masked_fill(in_topk_NV, -math.inf).logsumexp(-1, keepdim=True).clamp_min(-70)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return torch.cat([logp_NV.gather(1, ids_NK), rest_N1], -1).to(dtype), entropy_N.to(dtype)


class HeadLoss:
    """`TokenLoss` of a divergence: the divergence of each token, times a weight that is 1 by default."""

    def __init__(self, loss: DistillLoss, weights_N: torch.Tensor | None = None) -> None:
        self.loss, self.weights_N, self.reads_teachability = loss, weights_N, False
        self.terms = loss.divergence

    def divergence(
        self, teacher_logp_nK: torch.Tensor, student_logp_nC: torch.Tensor, entropy_n: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        return self.loss(teacher_logp_nK, student_logp_nC, entropy_n)

    def weights(self, divergence_n: torch.Tensor, tokens: Tokens, rows: slice) -> torch.Tensor:
        return torch.ones_like(divergence_n) if self.weights_N is None else self.weights_N[rows]

    def total(self, divergence_n: torch.Tensor, weights_n: torch.Tensor, tokens: Tokens, rows: slice) -> torch.Tensor:
        return divergence_n if self.weights_N is None else weights_n * divergence_n


def topk_of(ids_NK: torch.Tensor, logp_NK: torch.Tensor) -> TopK:
    """A teacher's top-k whose sampled tokens are unknown."""
    return TopK(ids_NK, logp_NK, torch.zeros_like(logp_NK[:, 0]))
