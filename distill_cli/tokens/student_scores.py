"""A teacher's top-k of its own tokens, as scores of the student's tokens (`text_plan`, `losses.own_tokens`).

Shape letters: T tokens of the teacher, R of the student, K the teacher's top-k, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy
import torch

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.losses.own_tokens import LEFT, weigh
from distill_cli.tokens.align import Alignment
from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.text_plan import Begun, Steps, TextPlan, plan_text, split_texts
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import TeacherScores


def to_student(
    scores: Sequence[TeacherScores],
    alignments: Sequence[Alignment],
    written: Sequence[Sequence[int]],
    tokens: TokenMap,
    *,
    topk: int,
) -> list[TeacherScores]:
    """Return scores of the student's tokens.

    Args:
        scores: the teacher's of each answer, by their top-k; fewer rows than tokens if an answer was cut.
        alignments: of the answers.
        written: the answers in the student's tokens.
        topk: likeliest tokens of each row that are kept.

    Returns:
        Scores [R, topk], padded with PADDING_ID. The rows of tokens that are left out have no other ids. `alignment` is
        filled in.
    """
    if not scores:
        return []
    plan = plan_text(alignments, written, [len(one.sampled_logp) for one in scores], tokens)
    whole, splits_E3 = _translate(plan, TeacherScores.cat(scores), tokens, topk=topk)
    parts = [whole.take(slice(begin, end)) for begin, end in pairwise(accumulate(plan.sizes, initial=0))]
    texts = split_texts(plan, splits_E3.numpy())
    return [replace(part, text=text) for part, text in zip(parts, texts, strict=True)]


def _translate(
    plan: TextPlan, scores: TeacherScores, tokens: TokenMap, *, topk: int
) -> tuple[TeacherScores, torch.Tensor]:
    """Return the scores of a plan's tokens, and the splits of their groups (`OwnText.splits`)."""
    first_R, written_R, teacher_T = (torch.from_numpy(one) for one in (plan.first_R, plan.written_R, plan.teacher_T))
    is_aligned_R, is_compared_R = torch.from_numpy(plan.is_aligned_R), torch.from_numpy(plan.is_compared_R)
    ids_TK, probs_TK = scores.topk_ids.long(), scores.topk_logp.double().exp()
    logp_T = scores.sampled_logp.double().clamp_min(PADDING_LOGP)
    is_known_T = (ids_TK == teacher_T[:, None]).any(1)
    known = _Known(ids_TK, probs_TK, teacher_T, logp_T.exp())
    moves_E5, move_probs_E, splits_E3 = known.moves(plan.steps, tokens)
    # Where the text's token is not in the top-k, no other token of the student has its probability.
    is_open_R = is_aligned_R & ~is_known_T[first_R]
    is_open_E = is_open_R[moves_E5[:, 0]]
    keep_E = ~is_open_E | (moves_E5[:, 3] == written_R[moves_E5[:, 0]])
    moves_E5, move_probs_E = moves_E5[keep_E], move_probs_E[keep_E]
    moves_E5[is_open_R[moves_E5[:, 0]], 4] = NO_TOKEN
    before_T = torch.cat([logp_T.new_zeros(1), logp_T.cumsum(0)])
    begun_E4, begun_probs_E = known.begun(plan.begun, tokens)
    parts = weigh(before_T, first_R, is_aligned_R, begun_E4, begun_probs_E, moves_E5, move_probs_E)

    begins = is_aligned_R.nonzero()[:, 0]
    places, firsts = first_R[begins], torch.from_numpy(tokens.first)
    targets_nK = tokens.groups.stand_in(begins[:, None], firsts[ids_TK[places]], splits_E3)
    masses_nK = probs_TK[places] * parts.weight_N[begins, None]
    residue_R = parts.residue_N.index_add(0, begins, (masses_nK * (targets_nK < 0)).sum(1))
    is_part_E = parts.masses_E != 0
    part_rows_E, part_masses_E = parts.rows_E[is_part_E], parts.masses_E[is_part_E]
    part_tokens_E = tokens.groups.stand_in(part_rows_E, parts.tokens_E[is_part_E], splits_E3)
    written_R = tokens.groups.stand_in(torch.arange(len(first_R)), written_R, splits_E3)

    # Most rows are the teacher's top-k under other ids; the others are added up token by token.
    is_plain_R = torch.zeros(len(first_R), dtype=torch.bool)
    sorted_nK = targets_nK.sort(dim=1).values
    is_plain_R[begins] = (sorted_nK[:, 0] >= 0) & (sorted_nK[:, 1:] != sorted_nK[:, :-1]).all(1)
    is_plain_R[part_rows_E] = False
    plain_n = is_plain_R[begins]
    ids_RK = torch.full((len(first_R), topk), PADDING_ID, dtype=torch.int32)
    logp_RK = torch.full((len(first_R), topk), PADDING_LOGP, dtype=torch.float64)
    written = torch.zeros(len(first_R), dtype=torch.float64)
    at, width = begins[plain_n], min(topk, ids_TK.shape[1])
    ids_RK[at, :width] = targets_nK[plain_n, :width].int()
    logp_RK[at, :width] = masses_nK[plain_n, :width].log()
    written[at] = (masses_nK[plain_n] * (targets_nK[plain_n] == written_R[at, None])).sum(1)

    is_ours_nK = (targets_nK >= 0) & ~plain_n[:, None]
    rows_E = torch.cat([begins[:, None].expand_as(targets_nK)[is_ours_nK], part_rows_E])
    tokens_E = torch.cat([targets_nK[is_ours_nK], part_tokens_E])
    masses_E = torch.cat([masses_nK[is_ours_nK], part_masses_E])
    size = tokens.student.size
    keys_P, places_E = torch.unique(rows_E * size + tokens_E, return_inverse=True)
    none_P = torch.zeros(len(keys_P), dtype=torch.float64)
    gains_P = none_P.index_add(0, places_E, masses_E.clamp_min(0.0))
    sums_P = gains_P.index_add(0, places_E, masses_E.clamp_max(0.0))
    sums_P = torch.where(sums_P > LEFT * gains_P, sums_P, 0.0)
    row_P, token_P = keys_P // size, keys_P % size
    is_written_P = token_P == written_R[row_P]
    written[row_P[is_written_P]] = sums_P[is_written_P]
    # A written token that is not among the likeliest has its probability all the same.
    own_R = torch.from_numpy(plan.written_R)
    alone_R = is_open_R & (firsts[teacher_T[first_R]] == own_R) & is_compared_R
    covered_E = moves_E5[moves_E5[:, 3] == own_R[moves_E5[:, 0]], 0]
    alone_R[covered_E] = False
    written += torch.where(alone_R, parts.weight_N * logp_T.exp()[first_R], 0.0)
    _fill_likeliest(row_P, token_P, sums_P, ids_RK, logp_RK)
    scores = TeacherScores.of_topk(ids_RK, logp_RK.float(), written.log().clamp_min(PADDING_LOGP).float())
    return replace(scores, alignment=torch.stack([is_aligned_R.double(), residue_R], dim=1).float()), splits_E3


def _fill_likeliest(
    row_P: torch.Tensor, token_P: torch.Tensor, sums_P: torch.Tensor, ids_RK: torch.Tensor, logp_RK: torch.Tensor
) -> None:
    """Fill in the likeliest tokens of some rows, and their log-probabilities.

    Args:
        row_P: rising.
    """
    if not len(row_P):
        return
    which_P, counts = torch.unique_consecutive(row_P, return_inverse=True, return_counts=True)[1:]
    column_P = torch.arange(len(row_P)) - (counts.cumsum(0) - counts)[which_P]
    padded = sums_P.new_zeros(len(counts), int(counts.max()))
    padded[which_P, column_P] = sums_P
    tokens = torch.full_like(padded, PADDING_ID, dtype=torch.int64)
    tokens[which_P, column_P] = token_P
    best, order = padded.topk(min(ids_RK.shape[1], padded.shape[1]), dim=1)
    rows = torch.unique_consecutive(row_P)
    is_some = best > 0
    ids = torch.where(is_some, tokens.gather(1, order), PADDING_ID).int()
    ids_RK[rows, : ids.shape[1]] = ids
    logp_RK[rows, : ids.shape[1]] = torch.where(is_some, best.log(), PADDING_LOGP)


class _Known:
    """The probabilities that a top-k knows, and those of the text's tokens."""

    def __init__(
        self, ids_TK: torch.Tensor, probs_TK: torch.Tensor, teacher_T: torch.Tensor, prob_T: torch.Tensor
    ) -> None:
        self._ids_TK, self._probs_TK, self._teacher_T, self._prob_T = ids_TK, probs_TK, teacher_T, prob_T

    def _at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's likeliest tokens and the text's, whose probability is 0 if it is among them: [n, C]."""
        text, ids = self._teacher_T[places, None], self._ids_TK[places]
        own = torch.where((ids == text).any(1, keepdim=True), 0.0, self._prob_T[places, None])
        return torch.cat([ids, text], dim=1), torch.cat([self._probs_TK[places], own], dim=1)

    def begun(self, begun: Begun, tokens: TokenMap) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the known tokens of the teacher that may have begun, as entries, and their probabilities."""
        places = torch.from_numpy(begun.places)
        ids, probs = self._at(places)
        fits, targets = map(torch.from_numpy, begun.targets_of(ids.numpy(), ids[:, -1].numpy(), tokens))
        at, column = (fits & (probs > 0)).nonzero(as_tuple=True)
        rows = torch.from_numpy(begun.rows)[at]
        return torch.stack([rows, places[at], ids[at, column], targets[at, column]], dim=1), probs[at, column]

    def moves(self, steps: Steps, tokens: TokenMap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the moves of known tokens of the teacher, their probabilities, and the splits below these tokens."""
        places = torch.from_numpy(steps.places)
        ids, probs = self._at(places)
        targets, children = steps.targets_of(ids.numpy(), ids[:, -1].numpy(), tokens)
        which, column = (children != NO_TOKEN).nonzero()
        # The text's token may be there twice.
        pairs = numpy.unique(numpy.stack([which, children[which, column]], axis=1), axis=0)
        splits_E3 = steps.splits_E3(tokens, *pairs.T)
        targets_nC = torch.from_numpy(targets)
        at, place = ((targets_nC != NO_TOKEN) & (probs > 0)).nonzero(as_tuple=True)
        rows, holders = (torch.from_numpy(one)[at] for one in (steps.rows, steps.holders))
        found = rows, places[at], ids[at, place], targets_nC[at, place], holders
        return torch.stack(found, dim=1), probs[at, place], torch.from_numpy(splits_E3)
