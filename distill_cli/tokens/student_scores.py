"""A teacher's scores of an answer in its own tokens, as scores of the student's tokens.

Before a token of the student the text ends where a token of the teacher begins, or inside one. What the teacher may be
writing there, given the tokens that the student wrote:

1. Its next token begins here. The weight is the product A of the probabilities of its tokens before.
2. It is inside a token u that began earlier, whose spelling (`TokenMap.spellings`) begins with the student's tokens
   since then. The weight is A of that beginning times u's probability. So a number that the student ends early is not
   taken for the teacher's: after `13` its token `132` is still possible, and `2` follows then.

The student's next token follows from u's spelling in 2, and from that of the next u in 1; the weights are normalised.
A u that ends here, while the text goes on inside another token, says nothing of what follows: its probability is a
residue, in the loss's rest class, like that of a token that the student has none for. Where the student's tokens are no
spelling of what the teacher reads, the teacher's tokens that begin with the same bytes stand for 2.

The text that was written tells more, since the teacher scored it. A student's token that goes beyond the teacher's
token U takes its part of what U has: the product of the probabilities of the teacher's tokens that it covers whole,
times the sum of those of the tokens that begin with what is left of it. And where U is the beginning of other tokens of
the student (`TokenMap.tree`), each takes its part by the teacher's next distribution.

If the student's tokens spell the teacher's, the probabilities of those that were written multiply to the teacher's of
the text.

Shape letters: T tokens of the teacher, R of the student, K the teacher's top-k, C = K + 1: and the written token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy
import torch
from numpy.typing import NDArray

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.tokens.align import Alignment
from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.token_map import HASH_BASE, OTHER_BYTES, Ints, TokenMap
from distill_cli.types import TeacherScores

Floats = NDArray[numpy.float64]
Bools = NDArray[numpy.bool_]


@dataclass
class _Shares:
    """Probabilities by token of the student, as a list of parts that add up."""

    rows: list[Ints] = field(default_factory=list)
    tokens: list[Ints] = field(default_factory=list)
    masses: list[Floats] = field(default_factory=list)

    def add(self, rows: Ints, tokens: Ints, masses: Floats) -> None:
        keep = (tokens >= 0) & (masses != 0)
        self.rows.append(numpy.broadcast_to(rows, tokens.shape)[keep])
        self.tokens.append(tokens[keep])
        self.masses.append(masses[keep])

    def move(self, rows: Ints, source: Ints, target: Ints, masses: Floats) -> None:
        """Move probability from one token to another."""
        self.add(rows, target, masses)
        self.add(rows, source, -masses)


@dataclass(frozen=True)
class _Begun:
    """The teacher's tokens that may have begun at some of the student's, and go on at later ones."""

    rows: Ints
    """The student's tokens inside them: [n]"""
    starts: Ints
    """The student's tokens where they began: [n]"""
    targets: Ints
    """The student's next tokens, or NO_TOKEN for a token of the teacher that ends before: [n, C]"""
    probs: Floats
    """[n, C]: 0 for tokens of the teacher that the student's do not spell."""
    has_text: Bools
    """Whether the teacher's token of the text is among them: [n]"""


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
    rows = _Rows.of(scores, alignments, written, tokens)
    return rows.collect(*rows.shares(), topk=topk)


@dataclass(frozen=True)
class _Rows:
    """The student's tokens of several answers end to end, and the teacher's."""

    map: TokenMap
    ids_TK: Ints
    probs_TK: Floats
    teacher_T: Ints
    """The teacher's tokens of the text."""
    prob_T: Floats
    """Of these tokens."""
    before_T: Floats
    """log A: the sum of their log-probabilities before each, over all answers; [T + 1]."""
    known_T: Bools
    """Whether the teacher's token of the text is in the top-k."""
    written_R: Ints
    first_R: Ints
    offset_R: Ints
    last_R: Ints
    until_R: Ints
    """See `Alignment.places_R4`, with tokens counted over all answers."""
    end_R: Ints
    """The end of the answer's scores among the teacher's tokens."""
    answer_end_R: Ints
    """The end of the answer among the student's tokens."""
    is_compared_R: Bools
    sizes: list[int]
    """Of the answers."""

    @classmethod
    def of(
        cls,
        scores: Sequence[TeacherScores],
        alignments: Sequence[Alignment],
        written: Sequence[Sequence[int]],
        tokens: TokenMap,
    ) -> _Rows:
        counts = [len(one.sampled_logp) for one in scores]
        sizes = [len(one.places_R4) for one in alignments]
        bases, bounds = (numpy.array(list(accumulate(one, initial=0)), dtype=numpy.int64) for one in (counts, sizes))
        base_R, end_R = numpy.repeat(bases[:-1], sizes), numpy.repeat(bases[1:], sizes)
        first_R, offset_R, last_R, until_R = numpy.concatenate([one.places_R4 for one in alignments]).T
        is_compared_R = (first_R >= 0) & (last_R + base_R < end_R)
        whole = TeacherScores.cat(scores)
        ids_TK = whole.topk_ids.numpy().astype(numpy.int64)
        logp_T = whole.sampled_logp.numpy().astype(numpy.float64).clip(min=PADDING_LOGP)
        shown = [token for one, count in zip(alignments, counts, strict=True) for token in one.teacher_ids[:count]]
        teacher_T: Ints = numpy.array(shown, dtype=numpy.int64)
        return cls(
            map=tokens,
            ids_TK=ids_TK,
            probs_TK=numpy.exp(whole.topk_logp.numpy().astype(numpy.float64)),
            teacher_T=teacher_T,
            prob_T=numpy.exp(logp_T),
            before_T=numpy.concatenate([[0.0], numpy.cumsum(logp_T)]),
            known_T=(ids_TK == teacher_T[:, None]).any(1),
            written_R=numpy.array([token for one in written for token in one], dtype=numpy.int64),
            first_R=numpy.where(is_compared_R, first_R + base_R, 0),
            offset_R=offset_R,
            last_R=numpy.where(is_compared_R, last_R + base_R, 0),
            until_R=until_R,
            end_R=end_R,
            answer_end_R=numpy.repeat(bounds[1:], sizes),
            is_compared_R=is_compared_R,
            sizes=sizes,
        )

    def candidates(self, places: Ints) -> tuple[Ints, Floats]:
        """Return the teacher's likeliest tokens at its tokens, and the written one with a probability of 0 if it is one
        of them: [n, C] each."""
        left = numpy.where(self.known_T[places], 0.0, self.prob_T[places])
        ids = numpy.concatenate([self.ids_TK[places], self.teacher_T[places][:, None]], axis=1)
        return ids, numpy.concatenate([self.probs_TK[places], left[:, None]], axis=1)

    def shares(self) -> tuple[_Shares, Floats, Floats]:
        """Return the probabilities of the student's tokens, the residue [R], and those of the teacher's tokens of the
        text in which the student's begin [R]."""
        shares, residue_R = _Shares(), numpy.zeros(len(self.first_R))
        begins = (self.is_compared_R & (self.offset_R == 0)).nonzero()[0]
        inside = (self.is_compared_R & (self.offset_R > 0)).nonzero()[0]
        holder_R: Ints = numpy.full(len(self.first_R), NO_TOKEN)
        weight_R = numpy.ones(len(self.first_R))
        self._go_on(begins, inside, shares, residue_R, holder_R, weight_R)
        # The teacher's next token begins here.
        places, weights = self.first_R[begins], weight_R[begins]
        targets, probs = self.map.first[self.ids_TK[places]], self.probs_TK[places] * weights[:, None]
        shares.add(begins[:, None], targets, probs)
        residue_R[begins] += (probs * (targets < 0)).sum(1)
        holder_R[begins] = self.map.first[self.teacher_T[places]]
        path_R = weight_R * self.prob_T[self.first_R]
        is_left_R = self.is_compared_R & (self.last_R > self.first_R)
        self._walk(begins, shares, holder_R, path_R, is_left_R)
        self._cover(is_left_R.nonzero()[0], shares, holder_R, path_R)
        return shares, residue_R, path_R

    def _go_on(
        self, begins: Ints, inside: Ints, shares: _Shares, residue_R: Floats, holder_R: Ints, weight_R: Floats
    ) -> None:
        """Add what follows inside tokens of the teacher that began earlier.

        Args:
            holder_R: gets the student's token that follows inside the text's own, where one begins inside.
            weight_R: gets the weight of the text's own token of the teacher, by which its probability counts.
        """
        number, is_reached_R = len(self.first_R), numpy.zeros(len(self.first_R), dtype=bool)
        begun = list(self._begun(begins))
        for one in begun:
            same = one.has_text & (self.first_R[one.rows] == self.first_R[one.starts])
            is_reached_R[one.rows[same]] = True
        counts_R = is_reached_R | (self.offset_R == 0)
        peak_R = numpy.where(self.offset_R == 0, self.before_T[self.first_R], -numpy.inf)
        for one in begun:
            numpy.maximum.at(peak_R, one.rows, self.before_T[self.first_R[one.starts]])
        total_R = numpy.where(self.offset_R == 0, numpy.exp(self.before_T[self.first_R] - peak_R), 0.0)
        scaled = []
        for one in begun:
            keep = counts_R[one.rows]
            weights = numpy.exp(self.before_T[self.first_R[one.starts]] - peak_R[one.rows]) * keep
            scaled.append(one.probs * weights[:, None])
            total_R += numpy.bincount(one.rows, weights=scaled[-1].sum(1), minlength=number)
        total_R = numpy.where(total_R > 0, total_R, 1.0)
        for one, probs in zip(begun, scaled, strict=True):
            probs = probs / total_R[one.rows][:, None]
            shares.add(one.rows[:, None], one.targets, probs)
            residue_R += numpy.bincount(one.rows, weights=(probs * (one.targets < 0)).sum(1), minlength=number)
            same = one.has_text & (self.first_R[one.rows] == self.first_R[one.starts])
            holder_R[one.rows[same]] = one.targets[same, -1]
        weight_R[:] = numpy.exp(numpy.where(counts_R, self.before_T[self.first_R] - peak_R, 0.0)) / total_R
        self._go_on_by_bytes(inside[~is_reached_R[inside]], shares, residue_R, holder_R, weight_R)

    def _begun(self, begins: Ints) -> Iterator[_Begun]:
        """Yield the teacher's tokens that go on after one more token of the student each time."""
        starts, hashes, count = begins, numpy.zeros(len(begins), dtype=numpy.uint64), 0
        spellings = self.map.spellings
        while len(starts):
            hashes = hashes * HASH_BASE + (self.written_R[starts + count] + 2).astype(numpy.uint64)
            count += 1
            going = (starts + count < self.answer_end_R[starts]) & spellings.are_open(hashes)
            starts, hashes = starts[going], hashes[going]
            rows = starts + count
            places = self.first_R[starts]
            ids, probs = self.candidates(places)
            fits = spellings.begins_with(ids, count, hashes[:, None])
            targets = numpy.where(fits, spellings.next_token(ids, count), NO_TOKEN)
            # The text's own token may end here: what follows it is known.
            is_text = ids == self.teacher_T[places][:, None]
            ends = (self.offset_R[rows] == 0) & (self.first_R[rows] == places + 1)
            probs = probs * (fits & ~(is_text & ends[:, None] & (targets < 0)))
            keep = self.is_compared_R[rows]
            yield _Begun(*(one[keep] for one in (rows, starts, targets, probs, fits[:, -1])))

    def _go_on_by_bytes(
        self, rows: Ints, shares: _Shares, residue_R: Floats, holder_R: Ints, weight_R: Floats
    ) -> None:
        """Add what follows inside a token of the teacher that the student's tokens do not spell."""
        places, offset = self.first_R[rows], self.offset_R[rows]
        ids, probs = self.candidates(places)
        own = self.teacher_T[places]
        targets = self.map.after(ids, offset[:, None], own[:, None])
        probs = probs * (targets != OTHER_BYTES)
        whole = probs.sum(1)
        shares.add(rows[:, None], targets, probs / whole[:, None])
        residue_R[rows] = (probs * (targets < 0)).sum(1) / whole
        holder_R[rows], weight_R[rows] = self.map.after(own, offset, own), 1 / whole

    def _walk(self, rows: Ints, shares: _Shares, holder_R: Ints, path_R: Floats, is_left_R: Bools) -> None:
        """Follow the text down the tree of the student's longer tokens.

        Args:
            holder_R: gets the token that has the probability of the text that was followed.
            path_R: the probability of the text's own token of the teacher.
            is_left_R: of written tokens that end in a later token of the teacher; False for those that are reached.
        """
        rows = rows[self.known_T[self.first_R[rows]]]  # no probability is known of the others' tokens to take from
        nodes, holders, masses = self.teacher_T[self.first_R[rows]], holder_R[rows], path_R[rows]
        tree, depth = self.map.tree, 0
        while len(rows):
            depth += 1
            places = self.first_R[rows] + depth
            inside = (places < self.end_R[rows]) & tree.is_inner[nodes]
            rows, nodes, holders, places = (one[inside] for one in (rows, nodes, holders, places))
            masses = masses[inside]
            if not len(rows):
                return
            is_last = places == self.last_R[rows]
            is_left_R[rows[is_last]] = False
            ids, probs = self.candidates(places)
            found = tree.child(nodes[:, None], ids)
            targets = tree.token_of(found)
            # The written token also has the tokens that go past its end, where they lead to no longer one.
            covers = numpy.zeros(ids.shape, dtype=bool)
            until = self.until_R[rows[is_last]]
            covers[is_last] = self.map.begins_alike(ids[is_last], ids[is_last, -1:], until[:, None])
            targets = numpy.where(covers & (targets < 0), self.written_R[rows][:, None], targets)
            moved = masses[:, None] * probs * (targets >= 0)
            shares.move(rows[:, None], numpy.broadcast_to(holders[:, None], targets.shape), targets, moved)
            masses = masses * self.prob_T[places]
            holders = numpy.where(targets[:, -1] >= 0, targets[:, -1], holders)
            nodes, holder_R[rows] = found[:, -1], holders
            going = nodes >= 0
            rows, nodes, holders = (one[going] for one in (rows, nodes, holders))
            masses = masses[going]

    def _cover(self, rows: Ints, shares: _Shares, holder_R: Ints, path_R: Floats) -> None:
        """Give written tokens that end in a later token of the teacher their part."""
        if not len(rows):
            return
        first, last, until = self.first_R[rows], self.last_R[rows], self.until_R[rows]
        between = numpy.exp(self.before_T[last] - self.before_T[first + 1])
        ids, probs = self.candidates(last)
        own = self.teacher_T[last]
        alike = self.map.begins_alike(ids, own[:, None], until[:, None])
        masses = path_R[rows] * between * (probs * alike).sum(1)
        is_known = self.known_T[first] | (self.offset_R[rows] > 0)
        shares.add(rows, self.written_R[rows], masses)
        shares.add(rows[is_known], holder_R[rows[is_known]], -masses[is_known])

    def collect(self, shares: _Shares, residue_R: Floats, path_R: Floats, *, topk: int) -> list[TeacherScores]:
        """Add the parts up, and return the likeliest tokens of each answer's rows."""
        number, size = len(self.first_R), self.map.student.size
        rows, tokens, masses = (numpy.concatenate(one) for one in (shares.rows, shares.tokens, shares.masses))
        keys, places = numpy.unique(rows * size + tokens, return_inverse=True)
        sums = numpy.bincount(places, weights=masses, minlength=len(keys)).clip(min=0.0)
        row, token = keys // size, keys % size
        written = numpy.zeros(number)
        is_written = token == self.written_R[row]
        written[row[is_written]] = sums[is_written]
        # A written token that is not among the likeliest has its probability all the same.
        alone = self.is_compared_R & (self.offset_R == 0) & ~self.known_T[self.first_R]
        alone &= (self.last_R == self.first_R) & (self.map.first[self.teacher_T[self.first_R]] == self.written_R)
        written[alone] += path_R[alone]
        order = numpy.lexsort((-sums, row))
        row, token, sums = row[order], token[order], sums[order]
        column = numpy.arange(len(row)) - numpy.searchsorted(row, row)
        keep = (column < topk) & (sums > 0)
        ids_RK = numpy.full((number, topk), PADDING_ID, dtype=numpy.int32)
        logp_RK = numpy.full((number, topk), PADDING_LOGP)
        ids_RK[row[keep], column[keep]] = token[keep]
        logp_RK[row[keep], column[keep]] = numpy.log(sums[keep])
        with numpy.errstate(divide="ignore"):
            written = numpy.log(written).clip(min=PADDING_LOGP)
        aligned = numpy.stack([(self.offset_R == 0).astype(numpy.float64), residue_R], axis=1)
        whole = TeacherScores(
            torch.from_numpy(ids_RK),
            torch.from_numpy(logp_RK).float(),
            torch.from_numpy(written).float(),
            torch.empty(number, 0),
            torch.from_numpy(aligned).float(),
        )
        bounds = accumulate(self.sizes, initial=0)
        return [whole.take(slice(begin, end)) for begin, end in pairwise(bounds)]
