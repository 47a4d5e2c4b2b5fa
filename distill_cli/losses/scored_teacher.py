"""What the fused head takes of a teacher, made of the scores that its engine returned."""

from __future__ import annotations

from dataclasses import dataclass

from distill_cli.losses.groups import RowGroups, TokenGroups
from distill_cli.losses.head import Head
from distill_cli.losses.objective import Objective
from distill_cli.losses.own_logits import OwnHead
from distill_cli.losses.teacher_chunk import OwnTeacher, TeacherHidden, TopK
from distill_cli.types import OwnText, TeacherScores


@dataclass(frozen=True)
class ScoredHead:
    """The head of a teacher whose scores are hidden states."""

    head: Head
    vocab_size: int
    """First id that the teacher does not score."""
    own: OwnHead | None = None
    """What its ids are to the student; None if they are the student's."""


def scored_teacher(
    scores: TeacherScores,
    objective: Objective,
    *,
    groups: TokenGroups | None,
    head: ScoredHead | None,
    student_size: int,
) -> TopK | TeacherHidden:
    """Return what is known of one teacher of some tokens.

    Args:
        scores: by their top-k, or by hidden states.
        groups: the student's tokens that count as one, if the teacher has a tokenizer of its own.
        head: read if the scores are hidden states.
        student_size: ids of the student's head, those of all shards.
    """
    by_row = None
    if groups is not None:
        splits = scores.topk_ids.new_empty(0, 3) if scores.text is None else scores.text.splits
        by_row = RowGroups.of(groups.to(splits.device), splits)
    if scores.hidden.shape[1] == 0:
        return TopK(scores.topk_ids, scores.topk_logp, scores.sampled_logp, by_row, objective.by_rank)
    assert head is not None
    weight, text = head.head.weight_VH, scores.text
    hidden = scores.hidden[:, : weight.shape[1]].to(weight.dtype)
    if head.own is None:
        hidden = hidden if text is None else hidden[text.places[:, 0].long()]
        return TeacherHidden(hidden, head.head, head.vocab_size, objective.support, objective.topk)
    own = OwnTeacher(text or OwnText.plain(0), head.own)  # a micro-batch without loss has no text
    return TeacherHidden(hidden, head.head, student_size, objective.support, objective.topk, own, by_row)
