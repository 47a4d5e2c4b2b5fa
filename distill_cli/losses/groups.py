"""Tokens of the student that one of them stands for, since a teacher writes them as several of its own.

Where the teacher's next token is `2`, and nothing is known of what it would write then, its probability is that of all
numbers that begin with it: the student's `2`, `25`, `257`. So these are compared as one class, whose probability in the
student is the sum of theirs, and the loss says nothing of their shares. Where more is known, a row has other groups
(`tokens.text_plan`): the splits.

Shape letters: n tokens of a chunk, V vocabulary (under tensor parallelism this rank's shard), M tokens that are in a
group, G groups, E splits of the chunk's rows, P pairs of a row and a token that stands for some of its splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from distill_cli.losses.head import ABSENT_LOGIT, Shard

MIN_SUM = 1e-300
"""The least sum of a group's exponentials, where the likeliest token's is 1."""


@dataclass(frozen=True)
class TokenGroups:
    """Groups of tokens, int64 each."""

    members_M: torch.Tensor
    """The tokens, those that stand for groups first."""
    groups_M: torch.Tensor
    """The group of each."""
    reps_G: torch.Tensor
    """The token that stands for each group."""

    @classmethod
    def none(cls) -> TokenGroups:
        return cls(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))

    def to(self, device: torch.device) -> TokenGroups:
        return TokenGroups(*(tensor.to(device) for tensor in vars(self).values()))

    def stand_in(self, rows_E: torch.Tensor, tokens_E: torch.Tensor, splits_S3: torch.Tensor) -> torch.Tensor:
        """Return the token that stands for each of some, at rows that are broadcast to them; itself if below 0.

        Args:
            splits_S3: row, token, and the token that stands for it there.
        """
        if not len(self.members_M):
            return tokens_E
        size = 1 + int(torch.cat([self.members_M, tokens_E.flatten(), splits_S3[:, 1]]).max())
        table = torch.arange(size, device=tokens_E.device)
        table[self.members_M] = self.reps_G[self.groups_M]
        found_E = torch.where(tokens_E >= 0, table[tokens_E], tokens_E)
        if len(splits_S3):
            keys_S, order_S = (splits_S3[:, 0] * size + splits_S3[:, 1]).sort()
            keys_E = rows_E * size + tokens_E
            place_E = torch.searchsorted(keys_S, keys_E).clamp_max(len(keys_S) - 1)
            is_split_E = (keys_S[place_E] == keys_E) & (tokens_E >= 0)
            found_E = torch.where(is_split_E, splits_S3[order_S[place_E], 2], found_E)
        return found_E


@dataclass(frozen=True)
class RowGroups:
    """Groups, and where rows have others."""

    groups: TokenGroups
    splits_E3: torch.Tensor
    """int64: the row, a token, and the token that stands for it there; rising by row."""

    @classmethod
    def of(cls, groups: TokenGroups, splits_E3: torch.Tensor) -> RowGroups | None:
        """Return the groups of rows; None if there are no groups."""
        if not len(groups.reps_G):
            return None
        splits_E3 = splits_E3.long()
        return cls(groups, splits_E3[splits_E3[:, 0].argsort(stable=True)])

    def take(self, rows: slice, number: int) -> RowGroups:
        """Return those of `number` rows from the start of a slice on."""
        bounds = self.splits_E3.new_tensor([rows.start, rows.start + number])
        begin, end = torch.searchsorted(self.splits_E3[:, 0].contiguous(), bounds).tolist()
        return RowGroups(self.groups, self.splits_E3[begin:end] - self.splits_E3.new_tensor([rows.start, 0, 0]))

    def stand_in(self, ids_n: torch.Tensor) -> torch.Tensor:
        """Return the token that stands for each row's."""
        rows_n = torch.arange(len(ids_n), device=ids_n.device)
        return self.groups.stand_in(rows_n, ids_n.long(), self.splits_E3)


class Grouped:
    """A chunk's logits with the tokens of each group as one, in place: the others have ABSENT_LOGIT."""

    def __init__(
        self,
        logits_nV: torch.Tensor,
        rows: RowGroups,
        sampled_ids_n: torch.Tensor,
        *,
        shard: Shard,
    ) -> None:
        """Group logits at temperature 1. Collectives."""
        self._shard, temperature = shard, shard.temperature
        groups, splits_E3 = rows.groups, rows.splits_E3
        self.class_ids_n = rows.stand_in(sampled_ids_n)
        """The tokens that stand for the sampled ones."""
        index_M, owned_M = shard.locate(groups.members_M)
        self._index_m, self._groups_m = index_M[owned_M], groups.groups_M[owned_M]
        number = len(groups.reps_G)
        peak_n = shard.all_reduce(logits_nV.amax(1), dist.ReduceOp.MAX)
        self.sampled_logp_n = self._sampled_logp(logits_nV, sampled_ids_n, peak_n)
        """The sampled tokens' own log-probabilities at temperature 1."""
        scaled_nm = ((logits_nV[:, self._index_m] - peak_n[:, None]) / temperature).double()
        self._exp_nm = scaled_nm.exp()
        rows_E, tokens_E, stands_E = splits_E3.unbind(1)
        index_E, owned_E = shard.locate(tokens_E)
        exp_E = ((logits_nV[rows_E, index_E] - peak_n[rows_E]) / temperature).double().exp()
        self._exp_E = shard.all_reduce(exp_E.masked_fill(~owned_E, 0.0), dist.ReduceOp.SUM)
        column_V = torch.zeros(shard.size, dtype=torch.int64, device=logits_nV.device)
        column_V[self._index_m] = torch.arange(len(self._index_m), device=logits_nV.device)
        self._exp_nm[rows_E[owned_E], column_V[index_E[owned_E]]] = 0.0  # subtracting them would leave rounding
        total_nG = self._exp_nm.new_zeros(len(logits_nV), number).index_add_(1, self._groups_m, self._exp_nm)
        self._total_nG = shard.all_reduce(total_nG, dist.ReduceOp.SUM).clamp_min_(MIN_SUM)
        keys_P, self._pair_E = torch.unique(rows_E * shard.total + stands_E, return_inverse=True)
        self._total_P = self._exp_E.new_zeros(len(keys_P)).index_add_(0, self._pair_E, self._exp_E).clamp_min_(MIN_SUM)
        pair_rows_P, stands_P = keys_P // shard.total, keys_P % shard.total
        own = shard.locate(stands_P)
        self._rows_P, self._index_P, self._owned_P = pair_rows_P, *own
        self._rows_E, self._index_E, self._owned_E = rows_E, index_E, owned_E
        self._reps_index_G, self._owned_G = shard.locate(groups.reps_G)
        logits_nV[:, self._index_m] = ABSENT_LOGIT
        logit_nG = (temperature * self._total_nG.log()).to(logits_nV) + peak_n[:, None]
        logits_nV[:, self._reps_index_G[self._owned_G]] = logit_nG[:, self._owned_G]
        logit_P = (temperature * self._total_P.log()).to(logits_nV) + peak_n[pair_rows_P]
        logits_nV[pair_rows_P[self._owned_P], self._index_P[self._owned_P]] = logit_P[self._owned_P]

    def _sampled_logp(self, logits_nV: torch.Tensor, sampled_ids_n: torch.Tensor, peak_n: torch.Tensor) -> torch.Tensor:
        shard = self._shard
        index_n1, owned_n1 = shard.locate(sampled_ids_n[:, None])
        logit_n = logits_nV.gather(1, index_n1).masked_fill(~owned_n1, 0.0)[:, 0]
        shard.all_reduce(logit_n, dist.ReduceOp.SUM)
        sum_n = shard.all_reduce((logits_nV - peak_n[:, None]).exp_().sum(1), dist.ReduceOp.SUM)
        return logit_n - peak_n - sum_n.log()

    def spread(self, grad_nV: torch.Tensor) -> None:
        """Give each group's gradient to its tokens by their shares, in place. Collectives."""
        shard = self._shard
        grad_nG = grad_nV[:, self._reps_index_G].masked_fill(~self._owned_G, 0.0)
        shard.all_reduce(grad_nG, dist.ReduceOp.SUM)
        grad_P = grad_nV[self._rows_P, self._index_P].masked_fill(~self._owned_P, 0.0)
        shard.all_reduce(grad_P, dist.ReduceOp.SUM)
        share_nG = grad_nG.double() / self._total_nG
        grad_nV[:, self._index_m] = (share_nG[:, self._groups_m] * self._exp_nm).to(grad_nV)
        share_E = (grad_P.double() / self._total_P)[self._pair_E] * self._exp_E
        mine = self._owned_E
        grad_nV[self._rows_E[mine], self._index_E[mine]] = share_E[mine].to(grad_nV)


def group_probabilities(probs_nV: torch.Tensor, rows: RowGroups) -> None:
    """Give the probabilities of whole vocabularies to the tokens that stand for others, in place."""
    groups, splits_E3 = rows.groups, rows.splits_E3
    rows_E, tokens_E, stands_E = splits_E3.unbind(1)
    split_E = probs_nV[rows_E, tokens_E]
    probs_nV[rows_E, tokens_E] = 0.0
    members_nM = probs_nV[:, groups.members_M]
    probs_nV[:, groups.members_M] = 0.0
    probs_nV.index_add_(1, groups.reps_G[groups.groups_M], members_nM)
    probs_nV.view(-1).index_add_(0, rows_E * probs_nV.shape[1] + stands_E, split_E)
