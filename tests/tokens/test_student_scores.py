"""Scores of a teacher with other tokens, against enumerating all that it may write."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distill_cli.tokens.align import Alignment, align
from distill_cli.tokens.student_scores import to_student
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import TeacherScores
from tests.tokens.reference import RESIDUE, Model, Reference, probability_of, random_model
from tests.tokens.vocabularies import byte_level, map_of, permuted

TINY = Path(__file__).parents[2] / "distill_cli" / "assets" / "tiny_pair" / "teacher"
AB, BA = ("a", "b"), ("b", "a")
PAIRS = {
    "the teacher's are longer": ([AB], [AB, BA, ("ab", "ab"), ("ab", "a"), ("ba", "b")]),
    "the student's are longer": ([AB, ("ab", "ab"), ("b", "b")], []),
    "both": ([AB, ("ab", "a"), ("b", "b")], [BA, ("ba", "b"), ("a", "a")]),
    "with a gap": ([("b", "b"), ("a", "bb")], []),
    "across": ([AB, ("ab", "b")], [BA, ("ba", "a")]),
}
"""Merges of the student and of the teacher."""


def scores_of(tokens: TokenMap, alignment: Alignment, model, *, topk: int | None = None) -> TeacherScores:
    rows = torch.tensor([model(alignment.teacher_ids[:place]) for place in range(len(alignment.teacher_ids))]).double()
    logp = rows.log()
    top = logp.topk(topk or logp.shape[1])
    own = logp.gather(1, torch.tensor(alignment.teacher_ids)[:, None])[:, 0]
    return TeacherScores.of_topk(top.indices.int(), top.values.float(), own.float())


def written_answers(tokens: TokenMap, number: int) -> list[list[int]]:
    """Answers as a student writes them that does not always write what its tokenizer would, with an end."""
    rng, answers = random.Random(0), []
    texts = [w for w, data in enumerate(tokens.student.token_bytes) if data]
    for index in range(number):
        if index % 2:
            answer = rng.choices(texts, k=12)
        else:
            text = "".join(rng.choices("ab", k=20)).encode()
            answer = [w for w, _ in tokens.student.encode(text)]
        answers.append([*answer, tokens.ends.student[0]])
    return answers


def row_of(scores: TeacherScores, place: int) -> dict[int, float]:
    pairs = zip(scores.topk_ids[place].tolist(), scores.topk_logp[place].exp().tolist(), strict=True)
    return {token: p for token, p in pairs if p > 1e-9}


@dataclass(frozen=True)
class Row:
    """A token of an answer, and what was found for it."""

    answer: list[int]
    alignment: Alignment
    place: int
    found: dict[int, float]
    residue: float

    @property
    def is_aligned(self) -> bool:
        return bool(self.alignment.places_R4[self.place, 1] == 0)

    @property
    def is_covered(self) -> bool:
        """Whether it ends in the teacher's token in which it begins."""
        first, _, last, _ = self.alignment.places_R4[self.place].tolist()
        return first == last


def rows_of(tokens: TokenMap, model: Model, *, own: bool = False) -> Iterator[Row]:
    """Score answers; `own` are those that the student's tokenizer would write."""
    for answer in written_answers(tokens, 40)[:: 2 if own else 1]:
        alignment = align(answer, tokens)
        (scores,) = to_student([scores_of(tokens, alignment, model)], [alignment], [answer], tokens, topk=32)
        for place in range(len(answer)):
            yield Row(answer, alignment, place, row_of(scores, place), float(scores.alignment[place, 1]))


@pytest.fixture(params=PAIRS)
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> TokenMap:
    return map_of(*(byte_level(tmp_path / str(index), merges) for index, merges in enumerate(PAIRS[request.param])))


def reference_of(tokens: TokenMap, model: Model) -> Reference:
    return Reference(tokens.student, tokens.teacher, model, ends=(tokens.ends.student[0], tokens.ends.teacher[0]))


def assert_equal(found: Mapping[object, float], expected: Mapping[object, float]) -> None:
    for token in found.keys() | expected.keys():
        assert found.get(token, 0.0) == pytest.approx(expected.get(token, 0.0), abs=3e-6), token


def test_equals_enumerating_what_is_known(tokens: TokenMap) -> None:
    model = random_model(tokens.teacher.size, seed=1)
    reference, kinds = reference_of(tokens, model), Counter()
    for row in rows_of(tokens, model):
        if row.is_aligned or row.is_covered:
            expected = reference.at(row.answer, row.alignment, row.place)
            assert_equal({**row.found, RESIDUE: row.residue}, expected)
            kinds[row.is_aligned] += 1
    assert kinds[True] > 200
    assert kinds[False] > 20 or not len(tokens.spellings.hashes)


def test_exact_where_the_teacher_covers(tmp_path: Path) -> None:
    """No token of the student is longer than the teacher's: nothing that the teacher would write is left open."""
    pair = PAIRS["the teacher's are longer"]
    tokens = map_of(*(byte_level(tmp_path / str(index), merges) for index, merges in enumerate(pair)))
    model = random_model(tokens.teacher.size, seed=2)
    reference = reference_of(tokens, model)
    for row in rows_of(tokens, model, own=True):
        assert_equal(
            {**row.found, RESIDUE: row.residue},
            reference.at(row.answer, row.alignment, row.place, knows_all=True),
        )


def test_what_is_open_begins_alike(tokens: TokenMap) -> None:
    """A token of the teacher that may go on to a longer one of the student leaves it only its own first byte."""
    model = random_model(tokens.teacher.size, seed=3)
    reference = reference_of(tokens, model)
    for row in rows_of(tokens, model, own=True):
        if row.is_aligned:
            expected = reference.at(row.answer, row.alignment, row.place, knows_all=True)
            assert_equal(*(collect(tokens, one) for one in ({**row.found, RESIDUE: row.residue}, expected)))


def collect(tokens: TokenMap, probabilities: Mapping[object, float]) -> dict[object, float]:
    """Return the probabilities of the first byte of the text."""
    found: dict[object, float] = defaultdict(float)
    for token, p in probabilities.items():
        data = tokens.student.token_bytes[token] if isinstance(token, int) else None
        found[data[:1] if data else token] += p
    return found


@pytest.mark.parametrize("further", [[], [("ba", "b"), ("bab", "ab"), ("aba", "ba")], [("b", "b"), ("bb", "bb")]])
def test_written_tokens_have_the_text_s_probability(tmp_path: Path, further: list[tuple[str, str]]) -> None:
    """If the teacher's tokens are made of the student's, the probabilities of both of a text are equal."""
    own, longer = PAIRS["the teacher's are longer"]
    tokens = map_of(byte_level(tmp_path / "s", own), byte_level(tmp_path / "t", [*longer, *further]))
    assert len(tokens.spellings.hashes)
    model = random_model(tokens.teacher.size, seed=4)
    for answer in written_answers(tokens, 40)[::2]:
        alignment = align(answer, tokens)
        (scores,) = to_student([scores_of(tokens, alignment, model)], [alignment], [answer], tokens, topk=32)
        expected = math.log(probability_of(model, alignment.teacher_ids))
        assert float(scores.sampled_logp.sum()) == pytest.approx(expected, abs=1e-4)


def test_scores_add_up(tokens: TokenMap) -> None:
    model = random_model(tokens.teacher.size, seed=5)
    for row in rows_of(tokens, model):
        assert sum(row.found.values()) + row.residue == pytest.approx(1.0, abs=1e-5)


def test_a_number_may_go_on(tmp_path: Path) -> None:
    """After the digits of a shorter number the teacher's longer one is still possible."""
    digits = "0123456789"
    merges = [("1", "3"), ("13", "2")]
    student, teacher = (
        byte_level(tmp_path / "s", [], letters=digits + ";"),
        byte_level(tmp_path / "t", merges, letters=digits + ";"),
    )
    tokens = map_of(student, teacher)
    by_text = {data: u for u, data in enumerate(tokens.teacher.token_bytes)}

    def model(context: list[int]) -> list[float]:
        """Writes 132 with 0.9 and 13 with 0.1, and then a semicolon."""
        weights = {by_text[b"132"]: 0.9, by_text[b"13"]: 0.1} if not context else {by_text[b";"]: 1.0}
        return [weights.get(u, 0.0) + 1e-9 for u in range(tokens.teacher.size)]

    answer = [tokens.student.token_of(data) for data in (b"1", b"3", b";")]
    alignment = align(answer, tokens)
    (scores,) = to_student([scores_of(tokens, alignment, model)], [alignment], [answer], tokens, topk=8)
    two, end = (tokens.student.token_of(data) for data in (b"2", b";"))
    assert row_of(scores, 2) == pytest.approx({two: 0.9, end: 0.1}, abs=1e-6)


def both(tmp_path: Path, *, shift: int) -> tuple[TokenMap, list[int]]:
    """The tiny tokenizer for the student, and the same with other ids for the teacher."""
    folder, new_id = permuted(TINY, tmp_path, shift=shift)
    return map_of(TINY, folder, end="<|im_end|>"), new_id


@pytest.mark.parametrize("topk", [4, 64, 512])
def test_permuted_ids_change_nothing(tmp_path: Path, topk: int) -> None:
    tokens, new_id = both(tmp_path, shift=11)
    answer = [w for w, _ in tokens.student.encode(b"47 + 85 = 132\n132 - 16 = 116\n#### 116")] + [2]
    logp = torch.randn(len(answer), 512, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    top, own = logp.topk(topk), logp.gather(1, torch.tensor(answer)[:, None])[:, 0]
    theirs = TeacherScores.of_topk(torch.tensor(new_id)[top.indices].int(), top.values, own)
    alignment = align(answer, tokens)
    assert alignment.teacher_ids == [new_id[token] for token in answer]
    (scores,) = to_student([theirs], [alignment], [answer], tokens, topk=topk)
    assert scores.topk_ids.tolist() == top.indices.tolist()
    torch.testing.assert_close(scores.topk_logp, top.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.sampled_logp, own, rtol=0, atol=1e-6)
    assert scores.alignment.tolist() == [[1.0, 0.0]] * len(answer)
