"""What stands between the student's tokens and a teacher with a tokenizer of its own (`model.teacher.tokenizer=own`).

The teacher reads what the student wrote as text in its own tokens, its scores come back as those of the student's
tokens, and what it writes itself becomes the student's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill_cli.engines.settings import SamplingSettings
from distill_cli.losses.groups import TokenGroups
from distill_cli.tokens.align import Alignment, align
from distill_cli.tokens.baselines import by_rank, by_spans
from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.student_scores import to_student
from distill_cli.tokens.text_plan import own_texts, plan_text
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import Rollout, Sample, Target, TeacherScores

if TYPE_CHECKING:
    import torch

LOOK_BACK = 16
"""Tokens before those of a step that are read again with them (`rollout.carry_over`)."""


@dataclass(frozen=True)
class TeacherRequest:
    """A sequence for the teacher to score."""

    token_ids: list[int]
    response_start: int
    alignment: Alignment
    """How the tokens from `response_start` on lie in the student's."""
    written: list[int]
    """The same part of the answer in the student's tokens."""
    logp: list[float]
    """Their log-probabilities by the student that sampled them; 0 if they are not known."""
    num_earlier: int = 0
    """The first of them, which earlier steps wrote, whose scores are not returned."""


@dataclass(frozen=True)
class Translation:
    """Translates between the student's tokens and those of one teacher."""

    tokens: TokenMap
    topk: int
    """Likeliest tokens of each position that are kept."""
    max_tokens: int
    """Longest sequence that the teacher scores; the end of a longer one is left out."""
    alignment: str = "bytes"
    """`loss.alignment`."""

    @property
    def firsts(self) -> torch.Tensor:
        """By the teacher's token the student's first one, or NO_TOKEN: int64."""
        import torch

        return torch.from_numpy(self.tokens.first)

    @property
    def groups(self) -> TokenGroups:
        """The student's tokens that count as one: none but by bytes."""
        return self.tokens.groups if self.alignment == "bytes" else TokenGroups.none()

    def request(self, rollout: Rollout, target: Target) -> TeacherRequest:
        """Return the sequence that a teacher scores, which begins with its version of the prompt."""
        prompt = rollout.prompt.ids_for(target)
        answer = rollout.answer.token_ids
        whole = align(answer, self.tokens)
        # A token of the teacher that began in what earlier steps wrote may go on here.
        carried = 0 if rollout.carried is None else len(rollout.carried.token_ids)
        begin = max(0, carried - LOOK_BACK)
        first, part = whole.part(begin)
        token_ids = (prompt + whole.teacher_ids)[: self.max_tokens]
        logp = [0.0] * (carried - begin) + (rollout.sample.logp or [0.0] * len(rollout.sample.token_ids))
        start = min(len(prompt) + first, len(token_ids))
        return TeacherRequest(token_ids, start, part, answer[begin:], logp, carried - begin)

    def to_student(
        self, scores: Sequence[TeacherScores], requests: Sequence[TeacherRequest], *, hidden: bool = False
    ) -> list[TeacherScores]:
        """Return the scores of the student's tokens; empty ones if the teacher was interrupted.

        Args:
            hidden: the scores are hidden states.
        """
        wanted = [len(one.token_ids) - one.response_start for one in requests]
        if [len(one.sampled_logp) for one in scores] != wanted:
            return [TeacherScores.empty(self.topk) for _ in requests]
        found = self._to_student(scores, requests, wanted, hidden=hidden)
        pairs = zip(found, requests, strict=True)
        return [one.take(slice(request.num_earlier, None)) if request.num_earlier else one for one, request in pairs]

    def _to_student(
        self, scores: Sequence[TeacherScores], requests: Sequence[TeacherRequest], wanted: list[int], *, hidden: bool
    ) -> list[TeacherScores]:
        alignments, written = [one.alignment for one in requests], [one.written for one in requests]
        if hidden:
            texts = own_texts(plan_text(alignments, written, wanted, self.tokens), self.tokens) if requests else []
            return [TeacherScores.of_hidden(one.hidden, text) for one, text in zip(scores, texts, strict=True)]
        if self.alignment == "rank":
            return [by_rank(one, request.alignment) for one, request in zip(scores, requests, strict=True)]
        if self.alignment == "spans":
            pairs = zip(scores, requests, strict=True)
            return [by_spans(one, r.alignment, r.written, r.logp, self.tokens, topk=self.topk) for one, r in pairs]
        return to_student(scores, alignments, written, self.tokens, topk=self.topk)

    def sampling(self, sampling: SamplingSettings) -> SamplingSettings:
        """Return the student's settings as the teacher answers with: its own tokens end an answer."""
        known = (self.tokens.special_of_student.get(token, NO_TOKEN) for token in sampling.stop_token_ids)
        return replace(sampling, stop_token_ids=tuple(token for token in known if token != NO_TOKEN))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the teacher's tokens, without special ones."""
        return b"".join(map(self.tokens.bytes_of_teacher.__getitem__, token_ids)).decode("utf-8", "replace")

    def sample(self, sample: Sample, *, max_new_tokens: int) -> Sample:
        """Return the teacher's answer in the student's tokens."""
        ids: list[int] = []
        text = b""
        for token in [*sample.token_ids, None]:
            special = None if token is None else self.tokens.special_of_teacher.get(token)
            if token is not None and special is None:
                text += self.tokens.bytes_of_teacher[token]
                continue
            ids += [piece for piece, _ in self.tokens.student.encode(text) if piece != NO_TOKEN]
            text = b""
            if special is not None and special != NO_TOKEN:
                ids.append(special)
        if len(ids) <= max_new_tokens:
            return replace(sample, token_ids=ids, logp=None)
        return replace(sample, token_ids=ids[:max_new_tokens], logp=None, finish_reason="length")
