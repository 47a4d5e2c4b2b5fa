"""What a teacher says of the student's tokens, by enumerating what it may write: no tables, no vectors.

A teacher is a function from the tokens so far to the probabilities of the next. The student reads a continuation of
the teacher's tokens u1 u2 ... as the deepest of its tokens w whose encoding by the teacher is a beginning of them, else
as the first token of u1's spelling.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence

from distill_cli.tokens.align import Alignment
from distill_cli.tokens.byte_vocabulary import NO_TOKEN, ByteVocabulary

Model = Callable[[Sequence[int]], list[float]]
RESIDUE = "residue"


def random_model(size: int, *, seed: int) -> Model:
    """A teacher without a pattern, whose probabilities depend on all tokens so far."""

    def probabilities(context: Sequence[int]) -> list[float]:
        digest = hashlib.sha256(repr((seed, list(context))).encode()).digest()
        weights = [random.Random(digest + bytes([token])).random() ** 3 + 1e-3 for token in range(size)]
        return [weight / sum(weights) for weight in weights]

    return probabilities


def probability_of(model: Model, ids: Sequence[int]) -> float:
    """Return a model's probability of a sequence."""
    found = 1.0
    for place, u in enumerate(ids):
        found *= model(ids[:place])[u]
    return found


class Reference:
    def __init__(
        self, student: ByteVocabulary, teacher: ByteVocabulary, model: Model, *, ends: tuple[int, int]
    ) -> None:
        self.student, self.teacher, self.model, self.ends = student, teacher, model, ends
        self.paths = {}
        for w, data in enumerate(student.token_bytes):
            if data and student.encode(data) == [(w, len(data))]:
                path = tuple(u for u, _ in teacher.encode(data))
                if NO_TOKEN not in path and (len(path) == 1 or self._is_root(path[0])):
                    self.paths[path] = w
        self.path_of = {w: path for path, w in self.paths.items()}

    def _is_root(self, u: int) -> bool:
        data = self.bytes_of(u)
        return len(self.spelling(u)) == 1 and self.teacher.encode(data) == [(u, len(data))]

    def stands_in(self, w: int, text: Sequence[int]) -> int:
        """Return the token that stands for one, where the teacher's tokens `text` follow."""
        path = self.path_of.get(w, ())
        if len(path) < 2:
            return w
        same = next(
            (n for n, pair in enumerate(zip(path, text, strict=False)) if pair[0] != pair[1]), min(len(path), len(text))
        )
        depth = min(len(path), same + 1) if 0 < same < len(text) else max(same, 1)
        while path[:depth] not in self.paths and depth > 1:
            depth -= 1
        return self.paths[path[:depth]]

    def bytes_of(self, u: int) -> bytes:
        return self.teacher.token_bytes[u] or b""

    def spelling(self, u: int) -> list[int]:
        if u == self.ends[1]:
            return [self.ends[0]]
        return [w for w, _ in self.student.encode(self.bytes_of(u))]

    def longest(self, data: bytes) -> int:
        fits = [w for w, own in enumerate(self.student.token_bytes) if own and data.startswith(own)]
        return max(fits, key=lambda w: len(self.student.token_bytes[w] or b""), default=NO_TOKEN)

    def goes_on(self, path: tuple[int, ...]) -> bool:
        return any(len(other) > len(path) and other[: len(path)] == path for other in self.paths)

    def at(self, answer: Sequence[int], alignment: Alignment, place: int, *, knows_all: bool = False) -> Counter:
        """Return the probabilities of the student's tokens at a place of an answer.

        Args:
            knows_all: also what the teacher would write after other tokens than the text's.
        """
        ids, places = alignment.teacher_ids, alignment.places_R4.tolist()
        first, offset, *_ = places[place]
        found, is_reached = Counter(), False
        for start in (index for index in range(place) if places[index][1] == 0):
            begun, so_far = places[start][0], list(answer[start:place])
            weight = probability_of(self.model, ids[:begun])
            for u, p in enumerate(self.model(ids[:begun])):
                spelling = self.spelling(u)
                if spelling[: len(so_far)] != so_far:
                    continue
                is_text = u == ids[begun]
                is_reached |= is_text and begun == first
                if len(spelling) > len(so_far):
                    found[spelling[len(so_far)]] += weight * p
                elif not (is_text and offset == 0 and first == begun + 1):
                    found[RESIDUE] += weight * p
        if offset and not is_reached:
            inside, grouped = self.inside(ids[:first], self.bytes_of(ids[first])[:offset]), Counter()
            for token, p in inside.items():
                grouped[token if token == RESIDUE else self.stands_in(token, [])] += p
            return grouped
        if offset == 0:
            written = self.student.token_bytes[answer[place]] or b""
            text = None if knows_all else ids[first:]
            self._read(ids[:first], (), NO_TOKEN, probability_of(self.model, ids[:first]), found, text, written)
        total, grouped = sum(found.values()), Counter()
        for token, p in found.items():
            token = token if token == RESIDUE else self.stands_in(token, ids[first:] if offset == 0 else [])
            grouped[token] += p / total
        return grouped

    def _read(
        self,
        context: list[int],
        path: tuple[int, ...],
        holder: int,
        mass: float,
        found: Counter,
        text: Sequence[int] | None,
        written: bytes,
    ) -> None:
        """Add the probabilities of the student's tokens where a token of the teacher begins.

        Args:
            text: the teacher's tokens that follow: what it would write after others is not known. None: it is.
            written: the bytes of the student's token that follows, which the teacher's last tokens may go past.
        """
        so_far = b"".join(map(self.bytes_of, path))
        for u, p in enumerate(self.model(context)):
            longer = (*path, u)
            if not path:
                own = self.spelling(u)[0]
            elif longer in self.paths:
                own = self.paths[longer]
            elif len(so_far) < len(written) and (so_far + self.bytes_of(u)).startswith(written):
                own = self.longest(written)
            else:
                own = holder
            is_known = text is None or (tuple(text[: len(longer)]) == longer and len(text) > len(longer))
            if self.goes_on(longer) and is_known:
                self._read([*context, u], longer, own, mass * p, found, text, written)
            else:
                found[own if own != NO_TOKEN else RESIDUE] += mass * p

    def inside(self, context: Sequence[int], pending: bytes) -> Counter:
        """Return the probabilities of the student's tokens after the first bytes of a token of the teacher."""
        fits = {u: p for u, p in enumerate(self.model(context)) if self.bytes_of(u).startswith(pending)}
        found: Counter = Counter()
        for u, p in fits.items():
            rest = self.bytes_of(u)[len(pending) :]
            own = self.longest(rest) if rest else NO_TOKEN
            found[own if own != NO_TOKEN else RESIDUE] += p / sum(fits.values())
        return found
