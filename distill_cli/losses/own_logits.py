"""The student's vocabulary by the hidden states of a teacher with a tokenizer of its own, a chunk at a time.

The teacher's logits are made twice: once for all of its tokens, of which a few probabilities are kept (`own_tokens`),
and once where one of them begins at a token of the student, whose probabilities are added up by the student's first
token. Neither [T, v] nor [N, V] is held.

Shape letters: T tokens of the teacher, t of a chunk, v its vocabulary (under tensor parallelism this rank's shard);
N tokens of the student, n of a chunk, V its vocabulary; H the teacher's hidden size, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from distill_cli.losses.groups import RowGroups, group_probabilities
from distill_cli.losses.head import Head, Shard, multiply
from distill_cli.losses.own_tokens import LEFT, weigh
from distill_cli.types import OwnText

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class OwnHead:
    """What the ids of a teacher's head are to the student."""

    firsts_v: torch.Tensor
    """int64, by id of this rank's rows of the head: the student's first token, below 0 if there is none."""
    size: int
    """Ids of each rank; the last ranks may have fewer."""


class OwnLogits:
    """Makes the probabilities of the student's tokens."""

    def __init__(
        self, text: OwnText, head: Head, own: OwnHead, operands: Operands, *, shard: Shard, num_tokens: int
    ) -> None:
        """Compute what is known of the text. Collectives.

        Args:
            operands: of the teacher's head, as `Head.operands` returned them for its hidden states [T, H].
            shard: of the student's vocabulary.
            num_tokens: tokens of a chunk.
        """
        self._hidden_TH, self._weight_vH, self._bias_v = operands
        self._head, self._own, self._shard = head, own, shard
        self._theirs = Shard(own.size, shard.group, shard.temperature)
        self._first_N, self._is_aligned_N = text.places[:, 0].long(), text.places[:, 1] > 0
        begun_E4, moves_E5 = text.begun.long(), text.moves.long()
        wanted_E2 = torch.cat([begun_E4[:, 1:3], moves_E5[:, 1:3]])
        logp_T, logp_E = self._read(text.token_ids.long(), wanted_E2, num_tokens=num_tokens)
        before_T = torch.cat([logp_T.new_zeros(1), logp_T.cumsum(0)])
        begun_probs_E, move_probs_E = logp_E.exp().split([len(begun_E4), len(moves_E5)])
        parts = weigh(before_T, self._first_N, self._is_aligned_N, begun_E4, begun_probs_E, moves_E5, move_probs_E)
        order_E = parts.rows_E.argsort(stable=True)
        order_E = order_E[(parts.masses_E[order_E] < 0).to(torch.int8).argsort(stable=True)]  # those above 0 first
        self._num_gains = int((parts.masses_E >= 0).sum())
        self._rows_E, self._tokens_E = parts.rows_E[order_E], parts.tokens_E[order_E]
        self._masses_E, self._weight_N = parts.masses_E[order_E], parts.weight_N

    def _read(
        self, token_ids_T: torch.Tensor, wanted_E2: torch.Tensor, *, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the text's tokens, and of tokens at places: float64 [T] and [E]. Collectives."""
        order_E = wanted_E2[:, 0].argsort(stable=True)
        places_E, ids_E = wanted_E2[order_E].T.contiguous()
        log_sums, of_text, of_wanted = [], [], []
        for start in range(0, max(len(self._hidden_TH), 1), num_tokens):
            logits_tv = self._logits(self._hidden_TH[start : start + num_tokens])
            log_sum_t = self._log_sum(logits_tv)
            log_sums.append(log_sum_t)
            rows_t = torch.arange(len(logits_tv), device=logits_tv.device)
            of_text.append(self._pick(logits_tv, rows_t, token_ids_T[start : start + num_tokens]) - log_sum_t)
            bounds = places_E.new_tensor([start, start + len(logits_tv)])
            begin, end = torch.searchsorted(places_E, bounds).tolist()
            rows_e = places_E[begin:end] - start
            of_wanted.append(self._pick(logits_tv, rows_e, ids_E[begin:end]) - log_sum_t[rows_e])
        self._log_sum_T = torch.cat(log_sums)
        logp_E = torch.empty(len(order_E), dtype=torch.float64, device=order_E.device)
        logp_E[order_E] = torch.cat(of_wanted).double()
        return torch.cat(of_text).double(), logp_E

    def probabilities(self, rows: slice, groups: RowGroups | None) -> torch.Tensor:
        """Return the probabilities of this rank's shard of the student's vocabulary at some of its tokens: [n, V].

        They add up to 1 over all shards, less what is no token of the student. Collectives.

        Args:
            groups: of these rows.
        """
        weight_n, first_n = self._weight_N[rows], self._first_N[rows]
        begins = self._is_aligned_N[rows].nonzero()[:, 0]
        places = first_n[begins]
        logits_mv = self._logits(self._hidden_TH[places]).div_(self._shard.temperature)
        probs_mv = logits_mv.sub_(self._log_sum_T[places, None]).exp_().mul_(weight_n[begins, None].to(logits_mv))
        is_ours_v = self._own.firsts_v >= 0
        probs_mV = probs_mv.new_zeros(len(begins), self._shard.total)
        probs_mV.index_add_(1, self._own.firsts_v[is_ours_v], probs_mv[:, is_ours_v])
        probs_nV = probs_mv.new_zeros(len(weight_n), self._shard.total).index_copy_(0, begins, probs_mV)
        self._shard.all_reduce(probs_nV, dist.ReduceOp.SUM)
        flat = probs_nV.view(-1)
        gained_e, gains_e = self._entries(rows, slice(self._num_gains))
        flat.index_add_(0, gained_e, gains_e.to(flat))
        lost_e, losses_e = self._entries(rows, slice(self._num_gains, None))
        least_e = LEFT * flat[lost_e]
        flat.index_add_(0, lost_e, losses_e.to(flat))
        flat[lost_e] = torch.where(flat[lost_e] > least_e, flat[lost_e], 0.0)
        if groups is not None:
            group_probabilities(probs_nV, groups)
        return probs_nV[:, self._shard.first : self._shard.first + self._shard.size]

    def _entries(self, rows: slice, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places in a chunk [n x V] and the masses of some of its parts."""
        rows_E, stop = self._rows_E[part], min(rows.stop, len(self._first_N))
        begin, end = torch.searchsorted(rows_E, rows_E.new_tensor([rows.start, stop])).tolist()
        at = (rows_E[begin:end] - rows.start) * self._shard.total + self._tokens_E[part][begin:end]
        return at, self._masses_E[part][begin:end]

    def _logits(self, hidden_tH: torch.Tensor) -> torch.Tensor:
        logits_tv = hidden_tH.new_empty(len(hidden_tH), len(self._weight_vH), dtype=self._dtype)
        multiply(hidden_tH, self._weight_vH.t(), out=logits_tv)
        cap = self._head.transform.soft_cap
        scratch_tv = logits_tv if cap is None else torch.empty_like(logits_tv)
        self._head.transform.apply(logits_tv, bias_V=self._bias_v, tanh_nV=scratch_tv)
        return logits_tv

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self._weight_vH.dtype, torch.float32)

    def _log_sum(self, logits_tv: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the sum of exponentials over all ranks, at the temperature: [t]. Collectives."""
        scaled_tv = logits_tv / self._shard.temperature
        peak_t = scaled_tv.amax(1) if scaled_tv.shape[1] else scaled_tv.new_full((len(scaled_tv),), -torch.inf)
        self._shard.all_reduce(peak_t, dist.ReduceOp.MAX)
        sum_t = self._shard.all_reduce(scaled_tv.sub_(peak_t[:, None]).exp_().sum(1), dist.ReduceOp.SUM)
        return peak_t + sum_t.log()

    def _pick(self, logits_tv: torch.Tensor, rows_e: torch.Tensor, ids_e: torch.Tensor) -> torch.Tensor:
        """Return logits of ids over all ranks, divided by the temperature: [e]. A collective."""
        index_e, owned_e = self._theirs.locate(ids_e)
        owned_e &= index_e < logits_tv.shape[1]
        picked_e = logits_tv.new_zeros(len(ids_e))
        picked_e[owned_e] = logits_tv[rows_e[owned_e], index_e[owned_e]]
        return self._shard.all_reduce(picked_e, dist.ReduceOp.SUM) / self._shard.temperature
