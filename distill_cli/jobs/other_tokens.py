"""Compare the student with a teacher that has a tokenizer of its own: how much of a sample aligns. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill_cli.models.model_files import ModelFiles
from distill_cli.tokens.align import align
from distill_cli.tokens.byte_vocabulary import NO_TOKEN, ByteVocabulary
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import Example

TEXTS = (
    "To find the area, multiply 12.5 by 348: the result is 4350. So the answer is $\\frac{8700}{2} = 4350$.\n",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # of at least one\n",
    "The committee will publish its findings in early spring, although several members disagreed.\n",
)
"""Prose, mathematics and code, for data that shows none."""
LITTLE = 0.5
"""Less of a sample than this aligns: a warning."""


@dataclass(frozen=True)
class OtherTokens:
    """A teacher's tokens next to the student's."""

    end_ids: tuple[int, ...]
    """The student's tokens that stand for the teacher's ends."""
    same: float
    """Share of the teacher's tokens that are tokens of the student."""
    aligned: float
    """Share of a sample's tokens of the student that begin where one of the teacher's does."""
    left_out: float
    """Share that the teacher says nothing of."""

    @property
    def verdict(self) -> str:
        """What `distill plan` says of it."""
        inside = 1 - self.aligned - self.left_out
        text = f"of a sample {self.aligned:.0%} of the student's tokens begin where its own do, {inside:.0%} inside one"
        left_out = f", {self.left_out:.1%} are left out" if self.left_out else ""
        return f"its own; {text}{left_out}; {self.same:.0%} of its tokens are the student's"


def compare(student: ModelFiles, teacher: ModelFiles, tokenizer: ModelFiles, sample: Example | None) -> OtherTokens:
    """Compare two models' tokenizers on the first row of the data. Raises ConfigError if one cannot be read."""
    tokens = TokenMap.read(student, teacher, tokenizer)
    places = [place for text in _texts(sample) for place in align(_encode(text, tokens.student), tokens).places_R4]
    number = max(len(places), 1)
    found = {tokens.special_of_teacher.get(end, NO_TOKEN) for end in teacher.eos_ids} - {NO_TOKEN}
    theirs = [token for token, data in enumerate(tokens.bytes_of_teacher) if data]
    twins = sum(tokens.twins[u] != NO_TOKEN for u in theirs)
    return OtherTokens(
        tuple(sorted(found)),
        twins / max(len(theirs), 1),
        sum(first >= 0 and offset == 0 for first, offset, *_ in places) / number,
        sum(first < 0 for first, *_ in places) / number,
    )


def _texts(sample: Example | None) -> Sequence[str]:
    parts = [] if sample is None else [sample.question, sample.response, sample.answer]
    return [*(part for part in parts if part), *TEXTS]


def _encode(text: str, vocabulary: ByteVocabulary) -> list[int]:
    return [token for token, _ in vocabulary.encode(text.encode()) if token != NO_TOKEN]
