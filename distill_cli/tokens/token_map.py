"""How a teacher's tokens read in a student's vocabulary. No torch.

A teacher's token u says that the text goes on with its bytes, which the student would write as its tokens v1 v2 ...:
its spelling (`spellings`). So u's probability is that of v1 first; and of v2 where the student has written v1 since u
would have begun. Where the student has written other tokens for these bytes, the longest of its tokens follows that the
rest of them begins with (`after`).

A student's token w that the teacher writes as several tokens E(w) = u1 u2 ... is a path in a tree, whose edges are the
teacher's tokens: `tree`. Only tokens that the student's tokenizer itself gives for their bytes have one, so the tree
of two equal tokenizers is empty.

Special tokens stand for no text. They are matched by their contents, else by what they do: end an answer, begin a turn,
begin or end a thought.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from distill_cli.models.model_files import ModelFiles
from distill_cli.tokens.byte_vocabulary import NO_TOKEN, ByteVocabulary
from distill_cli.tokens.tree import Bools, Ints, Tree, groups_of, spread

UNKNOWN = -3
"""An entry of the table of `after` that was not looked up yet."""
ROLES: dict[str, tuple[str, ...]] = {
    "turn": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>", "<|start|>", "[INST]"),
    "think": ("<think>", "[THINK]", "<|START_THINKING|>", "<seed:think>", "<|think|>"),
    "end of thought": ("</think>", "[/THINK]", "<|END_THINKING|>", "</seed:think>", "<|/think|>"),
}
"""Contents of tokens that do the same in different families."""
HASH_BASE = numpy.uint64(1_099_511_628_211)
if TYPE_CHECKING:
    from distill_cli.losses.groups import TokenGroups

Hashes = NDArray[numpy.uint64]


@dataclass(frozen=True)
class Ends:
    """The tokens that end an answer."""

    student: Sequence[int]
    teacher: Sequence[int]
    """The first one ends what the teacher is shown."""


@dataclass(frozen=True)
class Spellings:
    """The teacher's tokens as sequences of the student's."""

    first: Ints
    """By the teacher's token, the first of the student's, or NO_TOKEN."""
    hashes: Hashes
    """Rising: those of the beginnings of spellings of several tokens, the whole included, and of single tokens that are
    the beginning of some."""
    teacher: Ints
    """The teacher's token of each."""
    following: Ints
    """The student's token that follows in the spelling, NO_TOKEN after the whole."""
    lengths: Ints
    """By the teacher's token, the student's tokens of its spelling."""
    starts: Ints
    tokens: Ints
    all_hashes: Hashes
    """All spellings end to end, each with NO_TOKEN at its end; where each begins; and the hashes before each token."""

    @classmethod
    def of(cls, spellings: Sequence[Sequence[int]]) -> Spellings:
        lengths: Ints = numpy.array([len(one) for one in spellings], dtype=numpy.int64)
        starts: Ints = numpy.concatenate([[0], numpy.cumsum(lengths + 1)]).astype(numpy.int64)
        tokens: Ints = numpy.array([token for one in spellings for token in (*one, NO_TOKEN)], dtype=numpy.int64)
        hashes = _prefix_hashes(tokens, starts)
        owners = numpy.repeat(numpy.arange(len(lengths)), lengths + 1)
        is_beginning, is_long = numpy.arange(len(tokens)) > starts[owners], lengths[owners] > 1
        is_open = is_beginning & (is_long | numpy.isin(hashes, hashes[is_beginning & is_long]))
        places = is_open.nonzero()[0]
        places = places[numpy.argsort(hashes[places], kind="stable")]
        in_order = hashes[places], owners[places], tokens[places]
        return cls(tokens[starts[:-1]], *in_order, lengths, starts, tokens, hashes)

    def are_open(self, hashes: Hashes) -> Bools:
        """Return whether some of the teacher's tokens begin with tokens of these hashes."""
        begin, end = (numpy.searchsorted(self.hashes, hashes, side=side) for side in ("left", "right"))
        return end > begin

    def after(self, hashes: Hashes) -> tuple[Ints, Ints, Ints]:
        """Return all of the teacher's tokens that begin with tokens of these hashes: the place in `hashes`, the
        teacher's token, and the student's that follows."""
        which, at = spread(*(numpy.searchsorted(self.hashes, hashes, side=side) for side in ("left", "right")))
        return which, self.teacher[at], self.following[at]

    def follow(self, teacher: Ints, numbers: Ints, hashes: Hashes) -> tuple[Bools, Ints]:
        """Return whether tokens of the teacher begin with `numbers` tokens of these hashes, and what follows then."""
        places = self.starts[teacher] + numpy.minimum(numbers, self.lengths[teacher])
        fits = (self.lengths[teacher] >= numbers) & (self.all_hashes[places] == hashes)
        return fits, numpy.where(fits, self.tokens[places], NO_TOKEN)


class TokenMap:
    """The teacher's tokens in the student's vocabulary."""

    def __init__(self, student: ByteVocabulary, teacher: ByteVocabulary, *, ends: Ends, teacher_ids: int) -> None:
        """
        Args:
            teacher_ids: ids that the teacher scores: its tokens, and padding.
        """
        self.student, self.teacher, self.ends = student, teacher, ends
        self.teacher_ids = max(teacher_ids, teacher.size)
        self.special_of_teacher = _match_special(student, teacher, ends)
        """The student's token, or NO_TOKEN, of each of the teacher's that stands for no text."""
        self.special_of_student = _match_back(student, teacher, ends)
        """The teacher's token, or NO_TOKEN, of each of the student's that stands for no text."""
        data = [teacher.token_bytes[u] or b"" if u < teacher.size else b"" for u in range(self.teacher_ids)]
        data = [b"" if u in self.special_of_teacher else one for u, one in enumerate(data)]
        self.bytes_of_teacher = data
        self.lengths: Ints = numpy.array([len(one) for one in data], dtype=numpy.int64)
        self.starts: Ints = numpy.concatenate([[0], numpy.cumsum(self.lengths + 1)])
        """Place in `hashes` and `afters` of each of the teacher's tokens, which has one entry more than bytes."""
        flat = numpy.frombuffer(b"".join(one + b"\0" for one in data), dtype=numpy.uint8)
        self.hashes = _prefix_hashes(flat.astype(numpy.int64), self.starts)
        """By token and number of its first bytes: equal if these bytes are."""
        self.afters: Ints = numpy.full(self.starts[-1], UNKNOWN, dtype=numpy.int64)
        self.spellings = self._spell()
        self.first = self.spellings.first
        """By the teacher's token the student's first one, or NO_TOKEN."""

    @classmethod
    def read(cls, student: ModelFiles, teacher: ModelFiles, tokenizer: ModelFiles) -> TokenMap:
        """Read two models' tokenizers. Raises ConfigError.

        Args:
            tokenizer: the model whose tokenizer the student reads with.
        """
        ours, theirs = ByteVocabulary.read(tokenizer.folder), ByteVocabulary.read(teacher.folder)
        ours, theirs = ours.within(student.vocab_size), theirs.within(teacher.vocab_size)
        return cls(ours, theirs, ends=Ends(student.eos_ids, teacher.eos_ids), teacher_ids=teacher.vocab_size)

    def _spell(self) -> Spellings:
        same = {}
        if self.student.is_byte_level == self.teacher.is_byte_level:
            same = {text: number for number, text in enumerate(self.student.texts) if text is not None}
        found = list[list[int]]()
        for u, data in enumerate(self.bytes_of_teacher):
            twin = same.get(self.teacher.texts[u] or "") if data else None
            if u in self.special_of_teacher:
                found.append([self.special_of_teacher[u]])
            elif not data:
                found.append([NO_TOKEN])
            elif twin is not None and self.student.token_bytes[twin] == data:
                found.append([twin])
            elif (whole := self.student.token_of(data)) != NO_TOKEN:
                found.append([whole])
            else:
                found.append([token for token, _ in self.student.encode(data)])
        return Spellings.of(found)

    def after(self, tokens: Ints, offset: Ints) -> Ints:
        """Return the longest student's tokens that follow after the first bytes of the teacher's; NO_TOKEN at an end.

        Args:
            tokens: the teacher's, which have at least `offset` bytes.
        """
        places = self.starts[tokens] + offset
        wanted = numpy.unique(places[self.afters[places] == UNKNOWN])
        owners = numpy.searchsorted(self.starts, wanted, side="right") - 1
        for place, owner in zip(wanted.tolist(), owners.tolist(), strict=True):
            rest = self.bytes_of_teacher[owner][place - self.starts[owner] :]
            self.afters[place] = self.student.first(rest)
        return self.afters[places]

    def begins_alike(self, tokens: Ints, others: Ints, length: Ints) -> Bools:
        """Return whether tokens of the teacher have the same first bytes as others, which have at least `length`."""
        long = self.lengths[tokens] >= length
        mine = self.hashes[self.starts[tokens] + numpy.where(long, length, 0)]
        return long & (mine == self.hashes[self.starts[others] + length])

    def alike(self, tokens: Ints, length: Ints) -> tuple[Ints, Ints]:
        """Return all of the teacher's tokens with the same first bytes as some, after the index of each of those.

        Args:
            tokens: the teacher's, which have at least `length` bytes; [n].
            length: above 0.
        """
        hashes, owners = self._beginnings
        wanted = self.hashes[self.starts[tokens] + length]
        which, at = spread(*(numpy.searchsorted(hashes, wanted, side=side) for side in ("left", "right")))
        return which, owners[at]

    @cached_property
    def _beginnings(self) -> tuple[Hashes, Ints]:
        """The hashes of all beginnings of the teacher's tokens, rising, and the token of each."""
        owners = numpy.repeat(numpy.arange(self.teacher_ids), self.lengths + 1)
        places = (numpy.arange(len(owners)) > self.starts[owners]).nonzero()[0]
        places = places[numpy.argsort(self.hashes[places], kind="stable")]
        return self.hashes[places], owners[places]

    @cached_property
    def groups(self) -> TokenGroups:
        """The student's tokens that begin with the same token of the teacher."""
        import torch

        from distill_cli.losses.groups import TokenGroups

        return TokenGroups(*map(torch.from_numpy, groups_of(self.tree)))

    @cached_property
    def tree(self) -> Tree:
        """The student's tokens that the teacher writes as several."""
        paths, twins = dict[tuple[int, ...], int](), self.twins
        for w, data in enumerate(self.student.token_bytes):
            if not data or w in self.special_of_student:
                continue
            path = tuple(u for u, _ in self.teacher.encode(data))
            is_path = len(path) > 1 and NO_TOKEN not in path and twins[path[0]] != NO_TOKEN
            if is_path and self.student.is_own_encoding(w) and self.teacher.is_own_encoding(path[0]):
                paths[path] = w
        return Tree.of(paths, self.first)

    @cached_property
    def twins(self) -> Ints:
        """By the teacher's token the student's of the same bytes, or that does the same; else NO_TOKEN."""
        found = self.first.copy()
        for u, (v, data) in enumerate(zip(self.first.tolist(), self.bytes_of_teacher, strict=True)):
            if data and v != NO_TOKEN and self.student.token_bytes[v] != data:
                found[u] = NO_TOKEN
        return found


def _match_special(student: ByteVocabulary, teacher: ByteVocabulary, ends: Ends) -> dict[int, int]:
    """Return the student's token of each of the teacher's that stands for no text."""
    found = _same_special(teacher, student)
    for mine, theirs in _roles(student, teacher):
        found |= dict.fromkeys(theirs, mine[0])
    for number in ends.teacher:
        if found.get(number, NO_TOKEN) == NO_TOKEN and ends.student:
            found[number] = ends.student[0]
    return found


def _match_back(student: ByteVocabulary, teacher: ByteVocabulary, ends: Ends) -> dict[int, int]:
    """Return the teacher's token of each of the student's that stands for no text."""
    found = _same_special(student, teacher)
    for ours, same in _roles(student, teacher):
        found |= dict.fromkeys(ours, same[0])
    for number in ends.student:
        if found.get(number, NO_TOKEN) == NO_TOKEN:
            found[number] = next(iter(ends.teacher), NO_TOKEN)
    return found


def _same_special(one: ByteVocabulary, other: ByteVocabulary) -> dict[int, int]:
    """Return the other's token, or NO_TOKEN, of each that is special, or whose twin in the other is."""
    contents = {content: number for number, content in other.added.items()}
    twins = {number: contents.get(content, NO_TOKEN) for number, content in one.added.items()}
    return {number: twin for number, twin in twins.items() if number in one.special or twin in other.special}


def _roles(student: ByteVocabulary, teacher: ByteVocabulary) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of both for each role in which they have no token of the same content."""
    for names in ROLES.values():
        ours, theirs = ([one.id_of(name) for name in names] for one in (student, teacher))
        if not any(None not in pair for pair in zip(ours, theirs, strict=True)):
            mine, other = ([number for number in one if number is not None] for one in (ours, theirs))
            if mine and other:
                yield mine, other


def _prefix_hashes(flat: Ints, starts: Ints) -> Hashes:
    """Return the hashes of all beginnings of sequences that lie end to end, each followed by one entry more."""
    lengths = numpy.diff(starts) - 1
    hashes = numpy.zeros(starts[-1], dtype=numpy.uint64)
    for place in range(1, int(lengths.max(initial=0)) + 1):
        at = starts[:-1][lengths >= place] + place
        hashes[at] = hashes[at - 1] * HASH_BASE + (flat[at - 1] + 2).astype(numpy.uint64)
    return hashes
