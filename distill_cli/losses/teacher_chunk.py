"""What a chunk's loss needs of the teacher: from the top-k that its engine returned, or from its hidden states.

Shape letters: n tokens, V vocabulary (under tensor parallelism this rank's shard), K ids of the support, M likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from distill_cli.losses.distill_loss import PADDING_LOGP, with_rest
from distill_cli.losses.groups import RowGroups
from distill_cli.losses.head import ABSENT_LOGIT, Head, Merged, Shard, multiply
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.losses.own_logits import OwnHead
from distill_cli.losses.softmax import Softmax
from distill_cli.types import OwnText

ABSENT_BELOW = ABSENT_LOGIT / 2
Support = Literal["teacher", "student", "union", "full"]


@dataclass(frozen=True)
class TopK:
    """The teacher's top-k at each token; the support is those ids."""

    ids_NK: torch.Tensor
    """int [N, K], distinct within a row, the likeliest first. An id below 0 is padding: it counts neither for the top-k
    nor for the rest."""
    logp_NK: torch.Tensor
    """[N, K], normalised over the whole vocabulary; PADDING_LOGP at padding."""
    sampled_logp_N: torch.Tensor
    """[N], of the sampled token."""
    groups: RowGroups | None = None
    """What the tokens of the top-k stand for, if the teacher has a tokenizer of its own."""
    by_rank: bool = False
    """Whether the support is the student's top-k instead, and its i-th token is compared with the teacher's i-th."""


@dataclass(frozen=True)
class OwnTeacher:
    """What the tokens of a teacher with a tokenizer of its own are to the student."""

    text: OwnText
    head: OwnHead


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher's hidden states before its head, from which any support follows."""

    hidden_NH: torch.Tensor
    """[N, H_teacher], of the head's dtype."""
    head: Head
    """This rank's rows: those of the ids of the student's shard, as far as the shared vocabulary reaches."""
    vocab_size: int
    """First id that the teacher does not score."""
    support: Support
    topk: int
    """Ids of the teacher's and of the student's in the support; at most `vocab_size`. `full` has all."""
    own: OwnTeacher | None = None
    """None if the teacher reads the student's tokens; else the hidden states are those of its own."""
    groups: RowGroups | None = None
    """Likewise."""


@dataclass(frozen=True)
class TeacherView:
    """The teacher's predictions at a chunk's tokens."""

    ids_nK: torch.Tensor
    """The support's ids, distinct within a row, PADDING_ID where there are fewer. [n, 0] with full support."""
    logp_nK: torch.Tensor
    """Log-probabilities of these ids, PADDING_LOGP at padding."""
    argmax_n: torch.Tensor
    sampled_logp_n: torch.Tensor
    entropy_n: torch.Tensor
    top_ids_nM: torch.Tensor
    top_logp_nM: torch.Tensor
    teachability_n: torch.Tensor | None
    """See `Tokens`."""
    residue_n: torch.Tensor | None = None
    """The probability of no token of the student, if a teacher with a tokenizer of its own gives hidden states."""


def view_of_topk(
    teacher: TopK, rows: slice, student_logits_nV: torch.Tensor, *, shard: Shard, num_top: int, teachability: bool
) -> TeacherView:
    """Return what is known of a teacher by its top-k. A collective if teachability is read."""
    ids_nK, logp_nK = teacher.ids_NK[rows], teacher.logp_NK[rows]
    argmax_n, mass_n = ids_nK[:, 0].long(), None
    if teacher.by_rank:
        ids_nK, _ = shard.likeliest(student_logits_nV, ids_nK.shape[1])
    if teachability:
        own_ids_nK, _ = shard.likeliest(student_logits_nV, min(ids_nK.shape[1], shard.total))
        mass_n = logp_nK.exp().masked_fill(~is_among(ids_nK.long(), own_ids_nK), 0.0).sum(-1)
    return TeacherView(
        ids_nK,
        logp_nK,
        argmax_n=argmax_n,
        sampled_logp_n=teacher.sampled_logp_N[rows],
        entropy_n=top_entropy(logp_nK),
        top_ids_nM=ids_nK[:, :num_top].long(),
        top_logp_nM=logp_nK[:, :num_top],
        teachability_n=mass_n,
    )


class TeacherChunk:
    """The teacher's logits of a chunk, and its softmax."""

    def __init__(
        self,
        teacher: TeacherHidden,
        operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        rows: slice,
        *,
        buffer_nV: torch.Tensor,
        scratch_nV: torch.Tensor,
        shard: Shard,
        merged_eos_ids: Sequence[int],
    ) -> None:
        """Fill `buffer_nV` with logits at temperature 1, and overwrite `scratch_nV` if they are capped. Collectives.

        Args:
            operands: of the teacher's head, as `Head.operands` returned them.
        """
        hidden_NH, weight_vH, bias_v = operands
        self.shard, self.logits_nV, self.num_ids, self._teacher = shard, buffer_nV, weight_vH.shape[0], teacher
        self.rest_n: torch.Tensor | None = None
        """The probability of no token, if ids are absent here and there; those have ABSENT_LOGIT."""
        buffer_nV[:, self.num_ids :] = ABSENT_LOGIT
        if self.num_ids:
            own_nv = buffer_nV[:, : self.num_ids]
            multiply(hidden_NH[rows], weight_vH.t(), out=own_nv)
            teacher.head.transform.apply(own_nv, bias_V=bias_v, tanh_nV=scratch_nV[:, : self.num_ids])
        self.merged = Merged(buffer_nV, merged_eos_ids, shard=shard) if merged_eos_ids else None
        self.softmax = Softmax.of(buffer_nV, shard)

    @classmethod
    def of_probabilities(
        cls, probs_nV: torch.Tensor, teacher: TeacherHidden, *, shard: Shard, merged_eos_ids: Sequence[int]
    ) -> TeacherChunk:
        """Return the chunk of a teacher whose probabilities are known, overwritten by its logits. Collectives.

        Args:
            probs_nV: this rank's shard, at the temperature; what they lack of 1 is the probability of no token.
        """
        chunk = cls.__new__(cls)
        chunk.shard, chunk.num_ids, chunk._teacher = shard, probs_nV.shape[1], teacher
        sums_n2 = torch.stack([probs_nV.sum(-1), (probs_nV * probs_nV.log().clamp_min(ABSENT_LOGIT)).sum(-1)], dim=1)
        total_n, weighted_n = shard.all_reduce(sums_n2, dist.ReduceOp.SUM).unbind(1)
        rest_n = chunk.rest_n = (1 - total_n).clamp_min(0.0)
        chunk.logits_nV = probs_nV.log_().mul_(shard.temperature).clamp_min_(ABSENT_LOGIT)
        chunk.merged = Merged(chunk.logits_nV, merged_eos_ids, shard=shard) if merged_eos_ids else None
        argmax_n = Softmax.of(chunk.logits_nV, shard).argmax_n
        entropy_n = -weighted_n - torch.xlogy(rest_n, rest_n)
        none_n = torch.zeros_like(total_n)  # the logits are logarithms of probabilities
        chunk.softmax = Softmax(log_sum_n=none_n, log_sum_at_one_n=none_n, entropy_n=entropy_n, argmax_n=argmax_n)
        return chunk

    @property
    def is_full(self) -> bool:
        """Whether the support is the whole vocabulary."""
        return self._teacher.support == "full"

    @property
    def vocab_size(self) -> int:
        """First id that the teacher does not score."""
        return self._teacher.vocab_size

    def view(
        self, student_logits_nV: torch.Tensor, sampled_ids_n: torch.Tensor, *, num_top: int, teachability: bool
    ) -> TeacherView:
        """Return the teacher's predictions on the support. Collectives."""
        support, topk = self._teacher.support, self._teacher.topk
        ids_nK = torch.empty(len(sampled_ids_n), 0, dtype=torch.int64, device=self.logits_nV.device)
        own_ids_nK, theirs_nK = ids_nK, ids_nK
        if support in ("student", "union") or teachability:
            own_nV = student_logits_nV[:, : self.num_ids]
            own_ids_nK = as_padding(*self.shard.likeliest(own_nV, topk))
        if support in ("teacher", "union"):
            theirs_nK, _ = self.likeliest(topk)
        if support == "union":
            ids_nK = torch.cat([theirs_nK, own_ids_nK.masked_fill(is_among(own_ids_nK, theirs_nK), PADDING_ID)], dim=1)
        elif support != "full":
            ids_nK = own_ids_nK if support == "student" else theirs_nK
        top_ids_nM, top_logp_nM = self.likeliest(num_top)
        logp_nK = self.logp_at(ids_nK)
        if self.rest_n is not None:  # an absent id is in the rest
            ids_nK = ids_nK.masked_fill(logp_nK <= PADDING_LOGP, PADDING_ID)
        return TeacherView(
            ids_nK,
            logp_nK,
            argmax_n=self.softmax.argmax_n,
            sampled_logp_n=self.sampled_logp(sampled_ids_n),
            entropy_n=self.softmax.entropy_n,
            top_ids_nM=top_ids_nM,
            top_logp_nM=top_logp_nM,
            teachability_n=self.logp_at(own_ids_nK).exp().sum(-1) if teachability else None,
            residue_n=self.rest_n,
        )

    def likeliest(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's likeliest ids and their log-probabilities: [n, num] each. A collective."""
        ids_nM, logits_nM = self.shard.likeliest(self.logits_nV[:, : self.num_ids], num)
        logp_nM = logits_nM / self.shard.temperature - self.softmax.log_sum_n[:, None]
        ids_nM = as_padding(ids_nM, logits_nM)
        return ids_nM, logp_nM.masked_fill(ids_nM < 0, PADDING_LOGP)

    def logp_at(self, ids_nK: torch.Tensor) -> torch.Tensor:
        """Return the teacher's log-probabilities of ids [n, K], PADDING_LOGP for those below 0. A collective."""
        index_nK, owned_nK = self.shard.locate(ids_nK)
        logits_nK = self.logits_nV.gather(1, index_nK).masked_fill_(~owned_nK, 0.0)
        self.shard.all_reduce(logits_nK, dist.ReduceOp.SUM)
        logp_nK = logits_nK / self.shard.temperature - self.softmax.log_sum_n[:, None]
        return logp_nK.clamp_min(PADDING_LOGP).masked_fill_(ids_nK < 0, PADDING_LOGP)

    def sampled_logp(self, sampled_ids_n: torch.Tensor) -> torch.Tensor:
        """Return the teacher's log-probability of the sampled token [n]; one that is merged counts as its class."""
        if self.merged is not None:
            sampled_ids_n = torch.where(self.merged.has(sampled_ids_n), self.merged.ids_E[0], sampled_ids_n)
        return self.logp_at(sampled_ids_n[:, None])[:, 0]


def as_padding(ids_nM: torch.Tensor, logits_nM: torch.Tensor) -> torch.Tensor:
    """Return ids with PADDING_ID for those that cannot be: merged into another, or beyond the vocabulary."""
    return ids_nM.masked_fill(logits_nM < ABSENT_BELOW, PADDING_ID)


def is_among(ids_nK: torch.Tensor, others_nM: torch.Tensor) -> torch.Tensor:
    """Return whether each id is one of the row's others; padding is not. bool [n, K]."""
    sorted_nM = others_nM.sort(dim=1).values
    place_nK = torch.searchsorted(sorted_nM, ids_nK.contiguous()).clamp_max_(others_nM.shape[1] - 1)
    return (sorted_nM.gather(1, place_nK) == ids_nK) & (ids_nK >= 0)


def top_entropy(logp_nK: torch.Tensor) -> torch.Tensor:
    """Return the entropy of a top-k and the rest as one class: [n], at most the distribution's."""
    logp_nC = with_rest(logp_nK, torch.full_like(logp_nK[:, 0], PADDING_LOGP))
    return -(logp_nC.exp() * logp_nC).sum(-1)
