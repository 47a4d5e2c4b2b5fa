"""What a teacher may be writing at each of the student's tokens, as far as the text alone says. No torch.

Before a token of the student the text ends where a token of the teacher begins, or inside one. What the teacher may be
writing there, given the tokens that the student wrote:

1. Its next token begins here (`is_aligned_R`). The weight is the product A of the probabilities of its tokens before.
2. It is inside a token u that began earlier, whose spelling (`TokenMap.spellings`) begins with the student's tokens
   since then: an entry of `begun`. The weight is A of that beginning times u's probability. So a number that the
   student ends early is not taken for the teacher's: after `13` its token `132` is possible, and `2` follows then.

The student's next token follows from u's spelling in 2, and from that of the next u in 1. A u that ends here, while the
text goes on inside another token, says nothing of what follows. Where the student's tokens are no spelling of what the
teacher reads, the teacher's tokens that begin with the same bytes stand for 2.

The text that was written tells more, since the teacher scored it (`steps`). A student's token that goes beyond the
teacher's token U takes its part of what U has: the product of the probabilities of the teacher's tokens that it covers
whole, times the sum of those of the tokens that begin with what is left of it. And where U is the beginning of other
tokens of the student (`TokenMap.tree`), each takes its part by the teacher's next distribution.

`losses.own_tokens` makes probabilities of it.

Shape letters: T tokens of the teacher, R of the student, E entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy

from distill_cli.tokens.align import Alignment
from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.token_map import HASH_BASE, Hashes, TokenMap
from distill_cli.tokens.tree import Bools, Ints
from distill_cli.types import OwnText


@dataclass(frozen=True)
class Begun:
    """The places at which tokens of the teacher may have begun in which the student's do; [n] each."""

    rows: Ints
    """The student's tokens."""
    places: Ints
    """The places in the teacher's."""
    numbers: Ints
    """The student's tokens since then; 0 if it is by their bytes."""
    hashes: Hashes
    """Their hash, as in `Spellings`."""
    offsets: Ints
    """The bytes since then, if it is by them."""
    ends: Bools
    """Whether the text's own token of the teacher ends there, after which all is known."""

    def targets_of(self, teacher: Ints, text: Ints, tokens: TokenMap) -> tuple[Bools, Ints]:
        """Return which of some tokens of the teacher may have begun at each place, and the student's that follow.

        Args:
            teacher: [n, K]
            text: the teacher's own tokens at the places: [n].
        """
        by_bytes, text = (self.numbers == 0)[:, None], text[:, None]
        fits, targets = tokens.spellings.follow(teacher, self.numbers[:, None], self.hashes[:, None])
        fits &= ~((teacher == text) & self.ends[:, None] & (targets == NO_TOKEN))
        alike = by_bytes & tokens.begins_alike(teacher, text, self.offsets[:, None])
        offsets = numpy.broadcast_to(self.offsets[:, None], teacher.shape)
        targets = targets.copy()
        targets[alike] = tokens.after(teacher[alike], offsets[alike])
        return numpy.where(by_bytes, alike, fits), targets

    def entries_E4(self, text_T: Ints, tokens: TokenMap) -> Ints:
        """Return all tokens of the teacher that may have begun: the student's token, the place, the teacher's token,
        and the student's that follows, NO_TOKEN if it ends there."""
        spelled, by_bytes = (self.numbers > 0).nonzero()[0], (self.numbers == 0).nonzero()[0]
        which, teacher, targets = tokens.spellings.after(self.hashes[spelled])
        at = spelled[which]
        keep = ~((teacher == text_T[self.places[at]]) & self.ends[at] & (targets == NO_TOKEN))
        at, teacher, targets = at[keep], teacher[keep], targets[keep]
        which, others = tokens.alike(text_T[self.places[by_bytes]], self.offsets[by_bytes])
        also = by_bytes[which]
        at, teacher = numpy.concatenate([at, also]), numpy.concatenate([teacher, others])
        targets = numpy.concatenate([targets, tokens.after(others, self.offsets[also])])
        return numpy.stack([self.rows[at], self.places[at], teacher, targets], axis=1)


@dataclass(frozen=True)
class Steps:
    """The places at which the text tells more of a token of the student: in the tree, and where it ends; [n] each."""

    rows: Ints
    """The student's tokens."""
    places: Ints
    """The later tokens of the teacher."""
    nodes: Ints
    """The tree's node before each, NO_TOKEN if the text has left the tree."""
    holders: Ints
    """The student's token that has the probability up to there."""
    written: Ints
    """The student's written token if it ends there, else NO_TOKEN."""
    until: Ints
    """The bytes of the teacher's token up to its end, if it ends there."""
    known: Ints
    """The node that the text goes on to, if the teacher's distribution there is known, else NO_TOKEN."""
    reps: Ints
    """The token that stands for the group of the student's token."""

    def targets_of(self, teacher: Ints, text: Ints, tokens: TokenMap) -> tuple[Ints, Ints]:
        """Return the student's tokens that take the probability of some of the teacher's, or NO_TOKEN; and their nodes.

        Args:
            teacher: [n, K]
            text: the text's own tokens at the places: [n].
        """
        children = tokens.tree.child(self.nodes[:, None], teacher)
        targets = tokens.tree.token_of(children)
        # The written token also has the tokens that go past its end, where they lead to no longer one.
        alike = tokens.begins_alike(teacher, text[:, None], self.until[:, None])
        covers = (targets == NO_TOKEN) & (self.written != NO_TOKEN)[:, None] & alike
        return numpy.where(covers, self.written[:, None], targets), children

    def moves_E5(self, text_T: Ints, tokens: TokenMap) -> Ints:
        """Return all moves: the student's token, the place, the teacher's token there, the student's token that takes
        its probability, and the one that has it."""
        which, teacher, children = tokens.tree.edges(self.nodes)
        targets = tokens.tree.tokens[children]
        is_some = targets != NO_TOKEN
        ends = (self.written != NO_TOKEN).nonzero()[0]
        at, others = tokens.alike(text_T[self.places[ends]], self.until[ends])
        also = ends[at]
        is_other = tokens.tree.token_of(tokens.tree.child(self.nodes[also], others)) == NO_TOKEN
        also, others = also[is_other], others[is_other]
        which = numpy.concatenate([which[is_some], also])
        teacher = numpy.concatenate([teacher[is_some], others])
        targets = numpy.concatenate([targets[is_some], self.written[also]])
        return numpy.stack([self.rows[which], self.places[which], teacher, targets, self.holders[which]], axis=1)

    def splits_E3(self, tokens: TokenMap, which: Ints, children: Ints) -> Ints:
        """Return the tokens that others stand for below some nodes: the student's token, one of its vocabulary, and the
        one that stands for it.

        Args:
            which, children: the step, and the node below its own; [m] each.
        """
        tree = tokens.tree
        own, known = tree.tokens[children], children == self.known[which]
        stands = numpy.where(own != NO_TOKEN, own, self.holders[which])
        alone = known & (own != NO_TOKEN)
        # Those of the group's own token stay in the group.
        below = ~known & (stands != self.reps[which])
        at, others = tree.at_or_below(children[below])
        rows = numpy.concatenate([self.rows[which[alone]], self.rows[which[below]][at]])
        split = numpy.concatenate([own[alone], others])
        return numpy.stack([rows, split, numpy.concatenate([own[alone], stands[below][at]])], axis=1)


@dataclass(frozen=True)
class TextPlan:
    """The student's tokens of several answers end to end, and the teacher's."""

    teacher_T: Ints
    """The teacher's tokens."""
    written_R: Ints
    """The student's tokens."""
    is_compared_R: Bools
    """False for those that are left out."""
    is_aligned_R: Bools
    """Whether a token of the teacher begins where the student's does."""
    first_R: Ints
    """The teacher's token that begins there, or in which the student's begins."""
    begun: Begun
    steps: Steps
    counts: list[int]
    """Tokens of the teacher, by answer."""
    sizes: list[int]
    """Tokens of the student, by answer."""


def plan_text(
    alignments: Sequence[Alignment], written: Sequence[Sequence[int]], counts: Sequence[int], tokens: TokenMap
) -> TextPlan:
    """Plan several answers.

    Args:
        written: the answers in the student's tokens.
        counts: the teacher's tokens of each answer that are scored: fewer if it was cut.
    """
    return _Planner.of(alignments, written, counts, tokens).plan()


def own_texts(plan: TextPlan, tokens: TokenMap) -> list[OwnText]:
    """Return a plan's answers one by one, as tensors."""
    which, _, children = tokens.tree.edges(plan.steps.nodes)
    tables = [
        plan.begun.entries_E4(plan.teacher_T, tokens),
        plan.steps.moves_E5(plan.teacher_T, tokens),
        plan.steps.splits_E3(tokens, which, children),
    ]
    return _by_answer(plan, plan.teacher_T, plan.counts, tables)


def split_texts(plan: TextPlan, splits_E3: Ints) -> list[OwnText]:
    """Return the splits of a plan's answers one by one, which is all that scores by a top-k need."""
    none = [numpy.zeros((0, width), dtype=numpy.int64) for width in (4, 5)]
    return _by_answer(plan, plan.teacher_T[:0], [0] * len(plan.counts), [*none, splits_E3])


def _by_answer(plan: TextPlan, teacher_T: Ints, counts: Sequence[int], tables: Sequence[Ints]) -> list[OwnText]:
    import torch

    bounds, texts = ([0, *accumulate(one)] for one in (plan.sizes, counts))
    starts = [0, *accumulate(plan.counts)]
    tables = [table[numpy.argsort(table[:, 0], kind="stable")] for table in tables]
    at, found = [numpy.searchsorted(table[:, 0], bounds) for table in tables], []
    pairs = zip(pairwise(bounds), pairwise(texts), starts, strict=False)
    for index, ((begin, end), (first, last), start) in enumerate(pairs):
        places_R = numpy.where(plan.is_compared_R[begin:end], plan.first_R[begin:end] - start, NO_TOKEN)
        entries = []
        for table, cuts in zip(tables, at, strict=True):
            own = table[cuts[index] : cuts[index + 1]].copy()
            own[:, 0] -= begin
            if table.shape[1] > 3:
                own[:, 1] -= start
            entries.append(own)
        places_R2 = numpy.stack([places_R, plan.is_aligned_R[begin:end].astype(numpy.int64)], axis=1)
        parts = (teacher_T[first:last], places_R2, *entries)
        found.append(OwnText(*(torch.from_numpy(part.astype(numpy.int32)) for part in parts)))
    return found


@dataclass(frozen=True)
class _Planner:
    map: TokenMap
    teacher_T: Ints
    written_R: Ints
    is_compared_R: Bools
    first_R: Ints
    offset_R: Ints
    last_R: Ints
    until_R: Ints
    """See `Alignment.places_R4`, with tokens counted over all answers."""
    end_R: Ints
    """The end of the answer among the teacher's tokens."""
    answer_end_R: Ints
    """The end of the answer among the student's tokens."""
    counts: list[int]
    sizes: list[int]
    begun: list[tuple[Any, ...]] = field(default_factory=list)
    steps: list[tuple[Ints, ...]] = field(default_factory=list)

    @classmethod
    def of(
        cls, alignments: Sequence[Alignment], written: Sequence[Sequence[int]], counts: Sequence[int], tokens: TokenMap
    ) -> _Planner:
        sizes = [len(one.places_R4) for one in alignments]
        bases, bounds = (numpy.array(list(accumulate(one, initial=0)), dtype=numpy.int64) for one in (counts, sizes))
        base_R, end_R = numpy.repeat(bases[:-1], sizes), numpy.repeat(bases[1:], sizes)
        first_R, offset_R, last_R, until_R = numpy.concatenate([one.places_R4 for one in alignments]).T
        is_compared_R = (first_R >= 0) & (last_R + base_R < end_R)
        shown = [token for one, count in zip(alignments, counts, strict=True) for token in one.teacher_ids[:count]]
        return cls(
            map=tokens,
            teacher_T=numpy.array(shown, dtype=numpy.int64),
            written_R=numpy.array([token for one in written for token in one], dtype=numpy.int64),
            is_compared_R=is_compared_R,
            first_R=numpy.where(is_compared_R, first_R + base_R, 0),
            offset_R=numpy.where(is_compared_R, offset_R, 0),
            last_R=numpy.where(is_compared_R, last_R + base_R, 0),
            until_R=until_R,
            end_R=end_R,
            answer_end_R=numpy.repeat(bounds[1:], sizes),
            counts=list(counts),
            sizes=sizes,
        )

    def plan(self) -> TextPlan:
        is_aligned_R = self.is_compared_R & (self.offset_R == 0)
        begins, inside = is_aligned_R.nonzero()[0], (self.is_compared_R & (self.offset_R > 0)).nonzero()[0]
        holder_R: Ints = numpy.full(len(self.first_R), NO_TOKEN)
        holder_R[begins] = self.map.first[self.teacher_T[self.first_R[begins]]]
        self._begin(begins, holder_R)
        self._begin_by_bytes(inside[holder_R[inside] == NO_TOKEN], holder_R)
        is_left_R = self.is_compared_R & (self.last_R > self.first_R)
        self._walk(begins, holder_R, is_left_R)
        self._cover(is_left_R.nonzero()[0], holder_R)
        return TextPlan(
            teacher_T=self.teacher_T,
            written_R=self.written_R,
            is_compared_R=self.is_compared_R,
            is_aligned_R=is_aligned_R,
            first_R=self.first_R,
            begun=Begun(*self._begun_columns()),
            steps=Steps(*self._step_columns()),
            counts=self.counts,
            sizes=self.sizes,
        )

    def _begin(self, begins: Ints, holder_R: Ints) -> None:
        """Plan the teacher's tokens that began earlier and are spelled as the student wrote since.

        Args:
            holder_R: gets the student's next token inside the text's own token of the teacher.
        """
        starts, hashes, count = begins, numpy.zeros(len(begins), dtype=numpy.uint64), 0
        spellings, found = self.map.spellings, list[tuple[Any, ...]]()
        while len(starts):
            hashes = hashes * HASH_BASE + (self.written_R[starts + count] + 2).astype(numpy.uint64)
            count += 1
            going = starts + count < self.answer_end_R[starts]
            starts, hashes = starts[going], hashes[going]
            going = spellings.are_open(hashes)
            starts, hashes = starts[going], hashes[going]
            rows, places = starts + count, self.first_R[starts]
            keep = self.is_compared_R[rows]
            is_aligned, numbers = self.offset_R[rows] == 0, numpy.full(len(rows), count)
            fits, targets = spellings.follow(self.teacher_T[places], numbers, hashes)
            own = keep & fits & ~is_aligned & (self.first_R[rows] == places)
            holder_R[rows[own]] = targets[own]
            # The text's own token may end here: what follows it is known.
            ends = is_aligned & (self.first_R[rows] == places + 1)
            found.append(tuple(one[keep] for one in (rows, places, numbers, hashes, numpy.zeros_like(rows), ends)))
        for rows, *columns in found:  # inside a token that the student does not spell all else counts by bytes too
            keep = (self.offset_R[rows] == 0) | (holder_R[rows] != NO_TOKEN)
            self.begun.append(tuple(one[keep] for one in (rows, *columns)))

    def _begin_by_bytes(self, rows: Ints, holder_R: Ints) -> None:
        """Plan the teacher's tokens with the same first bytes as the text's own, which the student's do not spell."""
        places, offset = self.first_R[rows], self.offset_R[rows]
        own = self.teacher_T[places]
        none = numpy.zeros_like(rows)
        self.begun.append((rows, places, none, none.astype(numpy.uint64), offset, none.astype(bool)))
        holder_R[rows] = self.map.after(own, offset)

    def _begun_columns(self) -> Iterator[Any]:
        """Yield the columns of `Begun`."""
        none = numpy.zeros(0, dtype=numpy.int64)
        empty = (none, none, none, none.astype(numpy.uint64), none, none.astype(bool))
        yield from (numpy.concatenate(column) for column in zip(empty, *self.begun, strict=True))

    def _walk(self, rows: Ints, holder_R: Ints, is_left_R: Bools) -> None:
        """Follow the text down the tree of the student's longer tokens.

        Args:
            holder_R: gets the token that has the probability of the text that was followed.
            is_left_R: of written tokens that end in a later token of the teacher; False for those that are reached.
        """
        nodes, holders = self.teacher_T[self.first_R[rows]], holder_R[rows]
        tree, depth = self.map.tree, 0
        while len(rows):
            depth += 1
            places = self.first_R[rows] + depth
            inside = (places < self.end_R[rows]) & tree.is_inner[nodes]
            rows, nodes, holders, places = (one[inside] for one in (rows, nodes, holders, places))
            is_last = places == self.last_R[rows]
            is_left_R[rows[is_last]] = False
            following = tree.child(nodes, self.teacher_T[places])
            is_known = (following != NO_TOKEN) & (places + 1 < self.end_R[rows]) & tree.is_inner[following]
            known = numpy.where(is_known, following, NO_TOKEN)
            written = numpy.where(is_last, self.written_R[rows], NO_TOKEN)
            until = numpy.where(is_last, self.until_R[rows], 0)
            reps = self.map.first[self.teacher_T[self.first_R[rows]]]
            self.steps.append((rows, places, nodes, holders, written, until, known, reps))
            targets = tree.token_of(following)
            targets = numpy.where(targets == NO_TOKEN, written, targets)
            holders = numpy.where(targets != NO_TOKEN, targets, holders)
            holder_R[rows] = holders
            going = following != NO_TOKEN
            rows, nodes, holders = rows[going], following[going], holders[going]

    def _cover(self, rows: Ints, holder_R: Ints) -> None:
        """Give written tokens that end in a later token of the teacher, outside the tree, their part."""
        none, last = numpy.full(len(rows), NO_TOKEN), self.last_R[rows]
        self.steps.append((rows, last, none, holder_R[rows], self.written_R[rows], self.until_R[rows], none, none))

    def _step_columns(self) -> Iterator[Ints]:
        """Yield the columns of `Steps`."""
        empty = [numpy.zeros(0, dtype=numpy.int64)] * 8
        yield from (numpy.concatenate(column) for column in zip(empty, *self.steps, strict=True))
