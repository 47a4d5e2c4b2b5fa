"""A student and a teacher with heads of their own, and the divergence on every support: dense, in float64.

Shape letters: N tokens, H and h hidden sizes of student and teacher, V the student's vocabulary, v the teacher's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.logit_transform import IDENTITY, LogitTransform
from distill_cli.losses.teacher_chunk import TeacherHidden

from .reference import HeadLoss, classes, divergence

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, TOPK = 9, 6, 5, 32, 7


@dataclass(frozen=True)
class Pair:
    hidden_NH: torch.Tensor
    head: Head
    teacher_Nh: torch.Tensor
    teacher_head: Head
    vocab_size: int
    """First id that the teacher does not score."""

    def double(self) -> "Pair":
        heads = {
            name: replace(
                head, weight_VH=head.weight_VH.double(), bias_V=None if head.bias_V is None else head.bias_V.double()
            )
            for name, head in (("head", self.head), ("teacher_head", self.teacher_head))
        }
        return replace(self, hidden_NH=self.hidden_NH.double(), teacher_Nh=self.teacher_Nh.double(), **heads)

    def requires_grad(self) -> "Pair":
        head = self.head
        bias = None if head.bias_V is None else head.bias_V.detach().clone().requires_grad_()
        weight = head.weight_VH.detach().clone().requires_grad_()
        return replace(
            self,
            hidden_NH=self.hidden_NH.detach().clone().requires_grad_(),
            head=replace(head, weight_VH=weight, bias_V=bias),
        )

    @property
    def trained(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden_NH, self.head.weight_VH, self.head.bias_V) if x is not None]


def make_pair(
    *,
    tokens: int = TOKENS,
    vocab_size: int = VOCAB,
    transform: LogitTransform = IDENTITY,
    teacher_transform: LogitTransform = IDENTITY,
    with_bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = Head(draw(VOCAB, HIDDEN), draw(VOCAB) if with_bias else None, transform)
    teacher_head = Head(draw(vocab_size, TEACHER_HIDDEN), draw(vocab_size) if with_bias else None, teacher_transform)
    return Pair(draw(tokens, HIDDEN), head, draw(tokens, TEACHER_HIDDEN), teacher_head, vocab_size)


def run(pair: Pair, loss: DistillLoss, *, support: str, topk: int = TOPK, **options: Any) -> HeadOutput:
    teacher = TeacherHidden(pair.teacher_Nh, pair.teacher_head, pair.vocab_size, support, topk)
    token_loss = options.pop("token_loss", HeadLoss(loss, weights_of(pair)))
    options = {"chunk_tokens": 4, "sampled_ids_N": sampled_of(pair), "with_classes": True, **options}
    return linear_divergence(pair.hidden_NH, pair.head, teacher, token_loss, **options)


def weights_of(pair: Pair) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, len(pair.hidden_NH), dtype=torch.float64)


def sampled_of(pair: Pair) -> torch.Tensor:
    return torch.arange(len(pair.hidden_NH)) * 3 % pair.vocab_size


def dense_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    raw = head.transform.scale * (hidden @ head.weight_VH.t() + (0 if head.bias_V is None else head.bias_V))
    cap = head.transform.soft_cap
    return raw if cap is None else cap * (raw / cap).tanh()


def merge(p_NV: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """The distribution in which the end tokens are one class, the first's."""
    if not ends:
        return p_NV
    is_end_V = torch.zeros(p_NV.shape[1], dtype=torch.bool)
    is_end_V[list(ends)] = True
    first_V = torch.zeros(p_NV.shape[1], dtype=p_NV.dtype)
    first_V[ends[0]] = 1
    return p_NV.masked_fill(is_end_V, 0) + p_NV[:, is_end_V].sum(-1, keepdim=True) * first_V


def distributions(
    pair: Pair, *, temperature: float = 1.0, ends: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's and the student's over the student's vocabulary: float64 [N, V] each."""
    teacher_Nv = (dense_logits(pair.teacher_Nh, pair.teacher_head) / temperature).softmax(-1)
    p_NV = torch.nn.functional.pad(teacher_Nv, (0, VOCAB - pair.vocab_size))
    q_NV = (dense_logits(pair.hidden_NH, pair.head) / temperature).softmax(-1)
    return merge(p_NV, ends), merge(q_NV, ends)


def support_ids(p_NV: torch.Tensor, q_NV: torch.Tensor, *, support: str, topk: int, vocab_size: int) -> torch.Tensor:
    """The ids of the support: int64 [N, K], -1 where there are fewer."""
    theirs, own = (x_NV[:, :vocab_size].topk(topk).indices for x_NV in (p_NV, q_NV))
    ids = {"teacher": theirs, "student": own, "union": torch.cat([theirs, own], 1)}
    unique = [list(dict.fromkeys(row)) for row in ids[support].tolist()]
    return torch.tensor([row + [-1] * (ids[support].shape[1] - len(row)) for row in unique]).view(len(p_NV), -1)


def reference(
    pair: Pair,
    *,
    support: str,
    kl_type: str,
    tail: str,
    topk: int = TOPK,
    temperature: float = 1.0,
    ends: tuple[int, ...] = (),
) -> torch.Tensor:
    """The divergence at each token: float64 [N], differentiable."""
    kept = [token for token in range(VOCAB) if token not in ends[1:]]  # the others' probability is the first's
    vocab_size = sum(token < pair.vocab_size for token in kept)
    p_NV, q_NV = (x_NV[:, kept] for x_NV in distributions(pair, temperature=temperature, ends=ends))
    if support == "full":
        return divergence(kl_type, p_NV, q_NV, kl_weight=0.5, skew=0.1)
    ids_NK = support_ids(p_NV, q_NV, support=support, topk=topk, vocab_size=vocab_size)
    p_NC, q_NC = classes(tail, p_NV.gather(1, ids_NK.clamp_min(0)).masked_fill(ids_NK < 0, 0), q_NV, ids_NK)
    return divergence(kl_type, p_NC, q_NC, kl_weight=0.5, skew=0.1)
