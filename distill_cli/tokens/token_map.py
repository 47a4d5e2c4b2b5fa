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

import numpy
from numpy.typing import NDArray

from distill_cli.models.model_files import ModelFiles
from distill_cli.tokens.byte_vocabulary import NO_TOKEN, ByteVocabulary

Ints = NDArray[numpy.int64]
ENDS_HERE, OTHER_BYTES = -1, -2
"""In place of a student's token: the teacher's token has no byte after these, or does not begin with them."""
UNKNOWN = -3
"""An entry of the table of `after` that was not looked up yet."""
ROLES: dict[str, tuple[str, ...]] = {
    "turn": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>", "<|start|>", "[INST]"),
    "think": ("<think>", "[THINK]", "<|START_THINKING|>", "<seed:think>", "<|think|>"),
    "end of thought": ("</think>", "[/THINK]", "<|END_THINKING|>", "</seed:think>", "<|/think|>"),
}
"""Contents of tokens that do the same in different families."""
HASH_BASE = numpy.uint64(1_099_511_628_211)
Hashes = NDArray[numpy.uint64]


@dataclass(frozen=True)
class Ends:
    """The tokens that end an answer."""

    student: Sequence[int]
    teacher: Sequence[int]
    """The first one ends what the teacher is shown."""


@dataclass(frozen=True)
class Tree:
    """Nodes are sequences of the teacher's tokens; the first ones, by id, are single tokens."""

    teacher_ids: int
    keys: Ints
    """Of the edges, rising: the node times `teacher_ids`, and the token that leads on."""
    children: Ints
    """By edge, the node that it leads to."""
    tokens: Ints
    """By node, the student's token, or NO_TOKEN."""
    is_inner: NDArray[numpy.bool_]
    """By node, whether edges lead on."""

    def child(self, nodes: Ints, tokens: Ints) -> Ints:
        """Return the nodes to which the teacher's tokens lead; NO_TOKEN where they leave the tree."""
        if not len(self.keys):
            return numpy.full(numpy.broadcast_shapes(nodes.shape, tokens.shape), NO_TOKEN)
        keys = nodes * self.teacher_ids + tokens
        place = numpy.minimum(numpy.searchsorted(self.keys, keys), len(self.keys) - 1)
        return numpy.where(self.keys[place] == keys, self.children[place], NO_TOKEN)

    def token_of(self, nodes: Ints) -> Ints:
        """Return the student's tokens of nodes, NO_TOKEN where there is none."""
        return numpy.where(nodes >= 0, self.tokens[nodes], NO_TOKEN)


@dataclass(frozen=True)
class Spellings:
    """The teacher's tokens as sequences of the student's."""

    starts: Ints
    """Place of each of the teacher's tokens in the arrays below, which have one entry more than tokens for each."""
    lengths: Ints
    tokens: Ints
    """The student's tokens of each, and NO_TOKEN at the end."""
    hashes: Hashes
    """Of the student's tokens before each place (`hash_of`)."""
    open_hashes: Hashes
    """Those of beginnings after which a spelling goes on, and of whole spellings of several tokens; rising."""

    @classmethod
    def of(cls, spellings: Sequence[Sequence[int]]) -> Spellings:
        lengths: Ints = numpy.array([len(one) for one in spellings], dtype=numpy.int64)
        starts: Ints = numpy.concatenate([[0], numpy.cumsum(lengths + 1)]).astype(numpy.int64)
        tokens: Ints = numpy.array([token for one in spellings for token in (*one, NO_TOKEN)], dtype=numpy.int64)
        hashes = _prefix_hashes(tokens, starts)
        place = numpy.arange(len(tokens)) - numpy.repeat(starts[:-1], lengths + 1)
        whole = numpy.repeat(lengths, lengths + 1)
        return cls(starts, lengths, tokens, hashes, numpy.unique(hashes[(place > 0) & (whole > 1)]))

    def next_token(self, teacher: Ints, number: Ints | int) -> Ints:
        """Return the student's token after the first `number` of the teacher's tokens' spellings, or NO_TOKEN."""
        return self.tokens[self.starts[teacher] + numpy.minimum(number, self.lengths[teacher])]

    def begins_with(self, teacher: Ints, number: Ints, hashes: Hashes) -> NDArray[numpy.bool_]:
        """Return whether spellings begin with `number` tokens of these hashes."""
        long = self.lengths[teacher] >= number
        return long & (self.hashes[self.starts[teacher] + numpy.where(long, number, 0)] == hashes)

    def are_open(self, hashes: Hashes) -> NDArray[numpy.bool_]:
        """Return whether tokens of these hashes are in `open_hashes`."""
        if not len(self.open_hashes):
            return numpy.zeros(hashes.shape, dtype=bool)
        place = numpy.minimum(numpy.searchsorted(self.open_hashes, hashes), len(self.open_hashes) - 1)
        return self.open_hashes[place] == hashes


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
        self.first: Ints = self.spellings.next_token(numpy.arange(self.teacher_ids), 0)
        """By the teacher's token the student's first one, or NO_TOKEN."""

    @classmethod
    def read(cls, student: ModelFiles, teacher: ModelFiles, tokenizer: ModelFiles) -> TokenMap:
        """Read two models' tokenizers. Raises ConfigError.

        Args:
            tokenizer: the model whose tokenizer the student reads with.
        """
        vocabularies = ByteVocabulary.read(tokenizer.folder), ByteVocabulary.read(teacher.folder)
        ends = Ends(student.eos_ids, teacher.eos_ids)
        return cls(*vocabularies, ends=ends, teacher_ids=teacher.vocab_size)

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
                tokens = [token for token, _ in self.student.encode(data)]
                # What the teacher's own tokenizer would not write is no beginning of longer text.
                found.append(tokens if self.teacher.is_own_encoding(u) else tokens[:1])
        return Spellings.of(found)

    def after(self, tokens: Ints, offset: Ints, begins_with: Ints) -> Ints:
        """Return the student's tokens that follow inside teacher's tokens, ENDS_HERE or OTHER_BYTES.

        Args:
            tokens: the teacher's.
            offset: bytes of them that are written.
            begins_with: tokens of the teacher that begin with these bytes.
        """
        fits = (self.lengths[tokens] >= offset) & (
            self.hashes[self.starts[tokens] + numpy.minimum(offset, self.lengths[tokens])]
            == self.hashes[self.starts[begins_with] + offset]
        )
        places = self.starts[tokens] + offset
        places = numpy.where(fits, places, 0)
        wanted = numpy.unique(places[fits & (self.afters[places] == UNKNOWN)])
        owners = numpy.searchsorted(self.starts, wanted, side="right") - 1
        for place, owner in zip(wanted.tolist(), owners.tolist(), strict=True):
            rest = self.bytes_of_teacher[owner][place - self.starts[owner] :]
            self.afters[place] = self.student.first(rest) if rest else ENDS_HERE
        return numpy.where(fits, self.afters[places], OTHER_BYTES)

    def begins_alike(self, tokens: Ints, others: Ints, length: Ints) -> NDArray[numpy.bool_]:
        """Return whether the teacher's tokens have the same first bytes as others, which have at least so many."""
        long = self.lengths[tokens] >= length
        mine = self.hashes[self.starts[tokens] + numpy.where(long, length, 0)]
        return long & (mine == self.hashes[self.starts[others] + length])

    @cached_property
    def tree(self) -> Tree:
        """The student's tokens that the teacher writes as several."""
        nodes: dict[tuple[int, ...], int] = {}
        edges: dict[int, int] = {}
        tokens = self.first.tolist()
        for w, data in enumerate(self.student.token_bytes):
            if not data or w in self.special_of_student:
                continue
            path = [u for u, _ in self.teacher.encode(data)]
            if len(path) < 2 or NO_TOKEN in path or not self.student.is_own_encoding(w):
                continue
            node = path[0]
            for depth, u in enumerate(path[1:], start=2):
                key = node * self.teacher_ids + u
                if key not in edges:
                    edges[key] = nodes[tuple(path[:depth])] = len(tokens)
                    tokens.append(NO_TOKEN)
                node = edges[key]
            tokens[node] = w
        keys = numpy.array(sorted(edges), dtype=numpy.int64)
        children = numpy.array([edges[key] for key in keys.tolist()], dtype=numpy.int64)
        is_inner = numpy.zeros(len(tokens), dtype=bool)
        is_inner[keys // self.teacher_ids] = True
        return Tree(self.teacher_ids, keys, children, numpy.array(tokens), is_inner)


def _match_special(student: ByteVocabulary, teacher: ByteVocabulary, ends: Ends) -> dict[int, int]:
    """Return the student's token of each of the teacher's that stands for no text."""
    ours = {content: number for number, content in student.special.items()}
    found = {number: ours.get(content, NO_TOKEN) for number, content in teacher.special.items()}
    for mine, theirs in _roles(student, teacher):
        found |= dict.fromkeys(theirs, mine[0])
    for number in ends.teacher:
        if found.get(number, NO_TOKEN) == NO_TOKEN and ends.student:
            found[number] = ends.student[0]
    return found


def _match_back(student: ByteVocabulary, teacher: ByteVocabulary, ends: Ends) -> dict[int, int]:
    """Return the teacher's token of each of the student's that stands for no text."""
    theirs = {content: number for number, content in teacher.special.items()}
    found = {number: theirs.get(content, NO_TOKEN) for number, content in student.special.items()}
    for ours, same in _roles(student, teacher):
        found |= dict.fromkeys(ours, same[0])
    for number in ends.student:
        if found.get(number, NO_TOKEN) == NO_TOKEN:
            found[number] = next(iter(ends.teacher), NO_TOKEN)
    return found


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

