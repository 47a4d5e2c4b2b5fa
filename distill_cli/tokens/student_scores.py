"""A teacher's scores of an answer in its own tokens, as scores of the student's tokens.

At a token of the student that begins o bytes into the teacher's token U of the same text, with P the teacher's
distribution there, r the first o bytes of U, and c(u) the bytes of u:

    M    = sum of P(u) over the u that begin with r                                       1 where a token begins (o = 0)
    Q(v) = sum of P(u) / M over the u of which v is the student's next token after r      (`TokenMap.first`, `.after`)

A u that ends after r says nothing of the next token: its probability is a residue, in the loss's rest class, as is that
of a token that the student has none for.

Then the text that was written tells more, since the teacher scored it. A student's token that goes beyond U takes its
part of what Q gives to U's text: the product of the probabilities of the teacher's tokens that it covers whole, times
the sum of those of the tokens that begin with what is left of it. And where U is the beginning of other tokens of the
student (`TokenMap.tree`), each takes its part by the teacher's next distribution.

Shape letters: T tokens of the teacher, R of the student, K the teacher's top-k, C = K + 1: and the written token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy
import torch
from numpy.typing import NDArray

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.tokens.align import Alignment
from distill_cli.tokens.byte_vocabulary import NO_TOKEN
from distill_cli.tokens.token_map import OTHER_BYTES, Ints, TokenMap
from distill_cli.types import TeacherScores

Floats = NDArray[numpy.float64]


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
    shares, residue_R = rows.shares()
    return rows.collect(shares, residue_R, topk=topk)


@dataclass(frozen=True)
class _Rows:
    """The student's tokens of several answers end to end, and the teacher's."""

    map: TokenMap
    ids_TK: Ints
    probs_TK: Floats
    teacher_T: Ints
    """The teacher's tokens of the text."""
    logp_T: Floats
    known_T: NDArray[numpy.bool_]
    """Whether the teacher's token of the text is in the top-k."""
    written_R: Ints
    first_R: Ints
    offset_R: Ints
    last_R: Ints
    until_R: Ints
    """See `Alignment.places_R4`, with tokens counted over all answers."""
    end_R: Ints
    """The end of the answer's scores among the teacher's tokens."""
    is_compared_R: NDArray[numpy.bool_]
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
        bases = numpy.concatenate([[0], numpy.cumsum(counts)]).astype(numpy.int64)
        sizes = [len(one.places_R4) for one in alignments]
        base_R, end_R = numpy.repeat(bases[:-1], sizes), numpy.repeat(bases[1:], sizes)
        places_R4 = numpy.concatenate([one.places_R4 for one in alignments])
        first_R, offset_R, last_R, until_R = places_R4.T
        is_compared_R = (first_R >= 0) & (last_R + base_R < end_R)
        whole = TeacherScores.cat(scores)
        ids_TK = whole.topk_ids.numpy().astype(numpy.int64)
        teacher_T = numpy.array(
            [token for one, count in zip(alignments, counts, strict=True) for token in one.teacher_ids[:count]],
            dtype=numpy.int64,
        )
        return cls(
            tokens,
            ids_TK,
            numpy.exp(whole.topk_logp.numpy().astype(numpy.float64)),
            teacher_T,
            whole.sampled_logp.numpy().astype(numpy.float64),
            (ids_TK == teacher_T[:, None]).any(1),
            numpy.array([token for one in written for token in one], dtype=numpy.int64),
            numpy.where(is_compared_R, first_R + base_R, 0),
            offset_R,
            numpy.where(is_compared_R, last_R + base_R, 0),
            until_R,
            end_R,
            is_compared_R,
            sizes,
        )

    def candidates(self, places: Ints) -> tuple[Ints, Floats]:
        """Return the teacher's likeliest tokens at its tokens, and the written one with a probability of 0 if it is one
        of them: [n, C] each."""
        own = self.teacher_T[places]
        left = numpy.where(self.known_T[places], 0.0, numpy.exp(self.logp_T[places]))
        ids = numpy.concatenate([self.ids_TK[places], own[:, None]], axis=1)
        return ids, numpy.concatenate([self.probs_TK[places], left[:, None]], axis=1)

    def shares(self) -> tuple[_Shares, Floats]:
        """Return the probabilities of the student's tokens, and the residue [R]."""
        shares, residue_R = _Shares(), numpy.zeros(len(self.first_R))
        holder_R, path_R = numpy.full(len(self.first_R), NO_TOKEN), numpy.zeros(len(self.first_R))
        begins = (self.is_compared_R & (self.offset_R == 0)).nonzero()[0]
        inside = (self.is_compared_R & (self.offset_R > 0)).nonzero()[0]
        # Where both begin a token.
        places = self.first_R[begins]
        targets, probs = self.map.first[self.ids_TK[places]], self.probs_TK[places]
        shares.add(begins[:, None], targets, probs)
        residue_R[begins] = (probs * (targets < 0)).sum(1)
        holder_R[begins], path_R[begins] = self.map.first[self.teacher_T[places]], numpy.exp(self.logp_T[places])
        # Where the student's begins inside the teacher's.
        places, offset = self.first_R[inside], self.offset_R[inside]
        ids, probs = self.candidates(places)
        own = self.teacher_T[places]
        targets = self.map.after(ids, offset[:, None], own[:, None])
        probs = probs * (targets != OTHER_BYTES)
        whole = probs.sum(1)
        shares.add(inside[:, None], targets, probs / whole[:, None])
        residue_R[inside] = (probs * (targets < 0)).sum(1) / whole
        holder_R[inside] = self.map.after(own, offset, own)
        path_R[inside] = numpy.exp(self.logp_T[places]) / whole
        is_left_R = self.is_compared_R & (self.last_R > self.first_R)
        self._walk(begins, shares, holder_R, is_left_R)
        self._cover(is_left_R.nonzero()[0], shares, holder_R, path_R)
        return shares, residue_R

    def _walk(self, rows: Ints, shares: _Shares, holder_R: Ints, is_left_R: NDArray[numpy.bool_]) -> None:
        """Follow the text down the tree of the student's longer tokens.

        Args:
            holder_R: gets the token that has the probability of the text that was followed.
            is_left_R: of written tokens that end in a later token of the teacher; False for those that are reached.
        """
        rows = rows[self.known_T[self.first_R[rows]]]  # no probability is known of the others' tokens to take from
        nodes, holders = self.teacher_T[self.first_R[rows]], holder_R[rows]
        masses = numpy.exp(self.logp_T[self.first_R[rows]])
        tree, depth = self.map.tree, 0
        while len(rows):
            depth += 1
            places = self.first_R[rows] + depth
            inside = (places < self.end_R[rows]) & tree.is_inner[nodes]
            rows, nodes, holders, masses, places = (one[inside] for one in (rows, nodes, holders, masses, places))
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
            masses = masses * numpy.exp(self.logp_T[places])
            holders = numpy.where(targets[:, -1] >= 0, targets[:, -1], holders)
            nodes, holder_R[rows] = found[:, -1], holders
            going = nodes >= 0
            rows, nodes, holders, masses = (one[going] for one in (rows, nodes, holders, masses))

    def _cover(self, rows: Ints, shares: _Shares, holder_R: Ints, path_R: Floats) -> None:
        """Give written tokens that end in a later token of the teacher their part."""
        if not len(rows):
            return
        total_T = numpy.concatenate([[0.0], numpy.cumsum(self.logp_T)])
        first, last, until = self.first_R[rows], self.last_R[rows], self.until_R[rows]
        between = numpy.exp(total_T[last] - total_T[first + 1])
        ids, probs = self.candidates(last)
        own = self.teacher_T[last]
        alike = self.map.begins_alike(ids, own[:, None], until[:, None])
        masses = path_R[rows] * between * (probs * alike).sum(1)
        is_known = self.known_T[first] | (self.offset_R[rows] > 0)
        shares.add(rows, self.written_R[rows], masses)
        shares.add(rows[is_known], holder_R[rows[is_known]], -masses[is_known])

    def collect(self, shares: _Shares, residue_R: Floats, *, topk: int) -> list[TeacherScores]:
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
        written[alone] += numpy.exp(self.logp_T[self.first_R[alone]])
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
