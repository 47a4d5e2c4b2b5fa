"""Older ways to compare models with different tokenizers, to compare with (`loss.alignment`).

Both leave out the student's tokens that begin inside a token of the teacher.

Shape letters: T tokens of the teacher, R of the student, K the teacher's top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.tokens.align import Alignment
from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import TeacherScores

MOST = 1 - 1e-6
"""The largest probability of a merged span."""


def by_rank(scores: TeacherScores, alignment: Alignment) -> TeacherScores:
    """Return the teacher's top-k at the student's tokens with which one of its own begins, by rank.

    Universal logit distillation (arXiv 2402.12030) compares the i-th likeliest tokens of both, whatever they are; the
    ids here are ranks.

    Args:
        scores: at the teacher's tokens.
    """
    places, is_compared_R = _boundaries(alignment, len(scores.sampled_logp))
    found = scores.take(torch.where(is_compared_R, places, 0))
    ranks_RK = torch.arange(found.topk_ids.shape[1], dtype=torch.int32).expand_as(found.topk_ids)
    ids_RK = torch.where(is_compared_R[:, None], ranks_RK, PADDING_ID).int()
    return replace(found, topk_ids=ids_RK, alignment=_aligned(is_compared_R))


def by_spans(
    scores: TeacherScores,
    alignment: Alignment,
    written: Sequence[int],
    logp: Sequence[float],
    tokens: TokenMap,
    *,
    topk: int,
) -> TeacherScores:
    """Return the teacher's probabilities of tokens of equal bytes, and of the text to where both begin a token again.

    As in TRL's GOLD (its `ULDLoss` with merged spans), where a text has other numbers of tokens in both models, the
    likelihood of all of it counts at its first token: the teacher's of the span, divided by the student's of its
    further tokens, which have no loss of their own. Tokens of the teacher that the student does not have are in the
    rest.

    Args:
        logp: of the written tokens, by the student that sampled them.
    """
    number = len(scores.sampled_logp)
    places, is_compared_R = _boundaries(alignment, number)
    begins = is_compared_R.nonzero()[:, 0].tolist()
    twins_TK = torch.from_numpy(tokens.twins)[scores.topk_ids.long()].tolist()
    probs_TK = scores.topk_logp.double().exp().tolist()
    ids_RK = torch.full((len(written), topk), PADDING_ID, dtype=torch.int32)
    probs_RK = torch.zeros(len(written), topk, dtype=torch.float64)
    sampled_R = torch.zeros(len(written), dtype=torch.float64)
    for row, following in zip(begins, [*begins[1:], len(written)], strict=True):
        place = int(places[row])
        end = int(places[following]) if following < len(written) else number
        kept: dict[int, float] = {}
        for v, p in zip(twins_TK[place], probs_TK[place], strict=True):
            if v != NO_TOKEN:
                kept[v] = kept.get(v, 0.0) + p
        own, whole = written[row], float(scores.sampled_logp[place:end].double().sum())
        if following > row + 1 or end > place + 1:
            others = sum(p for v, p in kept.items() if v != own)
            rest = sum(logp[row + 1 : following])
            kept[own] = min(math.exp(min(whole - rest, 0.0)), max(MOST - others, 1e-9))
        likeliest = sorted(kept.items(), key=lambda pair: -pair[1])[:topk]
        for column, (v, p) in enumerate(likeliest):
            ids_RK[row, column], probs_RK[row, column] = v, p
        sampled_R[row] = kept.get(own, 0.0)
    logp_RK, sampled_R = (one.log().clamp_min(PADDING_LOGP).float() for one in (probs_RK, sampled_R))
    return replace(TeacherScores.of_topk(ids_RK, logp_RK, sampled_R), alignment=_aligned(is_compared_R))


def _boundaries(alignment: Alignment, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's token at each of the student's, and whether it begins there and is scored: [R] each."""
    places_R4 = torch.from_numpy(alignment.places_R4)
    first_R, offset_R, last_R = places_R4[:, 0], places_R4[:, 1], places_R4[:, 2]
    return first_R, (first_R >= 0) & (offset_R == 0) & (last_R < number)


def _aligned(is_compared_R: torch.Tensor) -> torch.Tensor:
    return torch.stack([is_compared_R.float(), torch.zeros(len(is_compared_R))], dim=1)
