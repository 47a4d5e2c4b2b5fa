"""An answer in the student's tokens, and in the teacher's: where each begins. No torch.

    student   |What| is| 1|2|3|?|        teacher   |Wh|at| is| |123|?|

A student's token begins where a teacher's does (aligned), or inside one. The bytes of that one that were written before
are known there, so the teacher's distribution is that of its tokens that begin with them (`student_scores`).

Shape letters: R student's tokens of an answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy

from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.token_map import Ints, TokenMap

LEFT_OUT = (-1, 0, -1, 0)
"""The places of a token that is not compared."""


@dataclass(frozen=True)
class Alignment:
    """An answer's tokens in the teacher's."""

    teacher_ids: list[int]
    """The answer as the teacher reads it."""
    places_R4: Ints
    """By the student's token: the teacher's token in which it begins, the bytes of that one before it, the teacher's
    token in which it ends, and the bytes of that one up to its end. LEFT_OUT if the teacher has no token for a part of
    it."""

    def part(self, begin: int) -> tuple[int, Alignment]:
        """Return the alignment of the tokens from `begin` on, after the place of their first token of the teacher."""
        places_R4 = self.places_R4[begin:].copy()
        known = places_R4[:, 0] >= 0
        first = int(places_R4[known, 0].min(initial=len(self.teacher_ids)))
        places_R4[known] -= numpy.array([first, 0, first, 0])
        return first, Alignment(self.teacher_ids[first:], places_R4)


def align(answer: Sequence[int], tokens: TokenMap) -> Alignment:
    """Return an answer of the student's tokens in the teacher's."""
    teacher_ids: list[int] = []
    places: list[tuple[int, int, int, int]] = [LEFT_OUT] * len(answer)
    text: list[tuple[int, bytes]] = []  # places of tokens, and their bytes

    def flush() -> None:
        _align_text(text, tokens, teacher_ids, places)
        text.clear()

    for place, token in enumerate(answer):
        if token in tokens.special_of_student:
            flush()
            if (theirs := tokens.special_of_student[token]) != NO_TOKEN:
                places[place] = (len(teacher_ids), 0, len(teacher_ids), 0)
                teacher_ids.append(theirs)
        elif token < tokens.student.size and (data := tokens.student.token_bytes[token]):
            text.append((place, data))
    flush()
    return Alignment(teacher_ids, numpy.array(places, dtype=numpy.int64).reshape(-1, 4))


def _align_text(
    text: Sequence[tuple[int, bytes]],
    tokens: TokenMap,
    teacher_ids: list[int],
    places: list[tuple[int, int, int, int]],
) -> None:
    """Append the teacher's tokens of some text, and fill in the places of the student's."""
    pieces = tokens.teacher.encode(b"".join(data for _, data in text))
    begins = list(accumulate((length for _, length in pieces), initial=0))
    known = [token != NO_TOKEN and tokens.lengths[token] == length for token, length in pieces]
    indices = list(accumulate((token != NO_TOKEN for token, _ in pieces), initial=len(teacher_ids)))
    end = 0
    for place, data in text:
        begin, end = end, end + len(data)
        first, last = bisect_right(begins, begin) - 1, bisect_right(begins, end - 1) - 1
        if all(known[first : last + 1]):
            places[place] = (indices[first], begin - begins[first], indices[last], end - begins[last])
    teacher_ids += [token for token, _ in pieces if token != NO_TOKEN]
