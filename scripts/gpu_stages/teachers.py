"""Check that a teacher scores after a sleep as it did before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distill_cli.types import TeacherScores

SPREAD = 1e-3
"""Smallest difference between a top-k's first and last log-probability that is not uniform."""


def teacher_problem(before: Sequence[TeacherScores], now: Sequence[TeacherScores], *, limit: float) -> str | None:
    """Return what is wrong with `now`, given the scores `before` of the same sequences; None if nothing is.

    Elsewhere a teacher that woke without its weights gave uniform scores, and trained a student to noise.
    """
    topk_logp = torch.cat([scores.topk_logp for scores in now])
    if not topk_logp.isfinite().all():
        return "scores are not finite"
    if (topk_logp[:, 0] - topk_logp[:, -1]).max() < SPREAD:
        return "scores are uniform: it has no weights"
    sampled = [torch.cat([scores.sampled_logp for scores in some]) for some in (before, now)]
    difference = float((sampled[0] - sampled[1]).abs().mean())
    return None if difference <= limit else f"scores differ by {difference:.2g} from those before it slept"


def planted_teachers(
    right: Sequence[TeacherScores], others: Sequence[TeacherScores]
) -> dict[str, Sequence[TeacherScores]]:
    """Return made-up scores of broken teachers: without weights, with NaN weights, and scoring other sequences."""

    def filled(value: float) -> list[TeacherScores]:
        return [
            replace(
                scores,
                topk_logp=torch.full_like(scores.topk_logp, value),
                sampled_logp=torch.full_like(scores.sampled_logp, value),
            )
            for scores in right
        ]

    return {"uniform": filled(-6.9), "not finite": filled(float("nan")), "stale": others}
