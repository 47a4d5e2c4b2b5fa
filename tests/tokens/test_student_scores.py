"""Scores of a teacher with other tokens, against enumerating all that it may write."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distill_cli.tokens.align import Alignment, align
from distill_cli.tokens.student_scores import to_student
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import TeacherScores
from tests.tokens.reference import RESIDUE, Model, Reference, random_model
from tests.tokens.vocabularies import byte_level, map_of, permuted

TINY = Path(__file__).parents[2] / "distill_cli" / "assets" / "tiny_pair" / "teacher"
AB, BA = ("a", "b"), ("b", "a")
PAIRS = {
    "the teacher's are longer": ([AB], [AB, BA, ("ab", "ab"), ("ab", "a"), ("ba", "b")]),
    "the student's are longer": ([AB, ("ab", "ab"), ("b", "b")], []),
    "both": ([AB, ("ab", "a"), ("b", "b")], [BA, ("ba", "b"), ("a", "a")]),
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
    """A token of an answer: what was found, and what the reference needs to say it."""

    found: dict[int, float]
    residue: float
    written: int
    context: list[int]
    text: list[int]
    """The teacher's tokens before and after the place."""
    offset: int
    covered: int
    """The teacher's tokens that the student's covers, the last perhaps in part."""


def rows_of(tokens: TokenMap, model: Model) -> Iterator[Row]:
    for answer in written_answers(tokens, 30):
        alignment = align(answer, tokens)
        ids = alignment.teacher_ids
        (scores,) = to_student([scores_of(tokens, alignment, model)], [alignment], [answer], tokens, topk=32)
        for place, (first, offset, last, _) in enumerate(alignment.places_R4.tolist()):
            residue = float(scores.alignment[place, 1])
            shown = ids[:first], ids[first:], offset, last - first + 1
            yield Row(row_of(scores, place), residue, answer[place], *shown)


@pytest.fixture(params=PAIRS)
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> TokenMap:
    return map_of(*(byte_level(tmp_path / str(index), merges) for index, merges in enumerate(PAIRS[request.param])))


def reference_of(tokens: TokenMap, model: Model) -> Reference:
    return Reference(tokens.student, tokens.teacher, model, ends=(tokens.ends.student[0], tokens.ends.teacher[0]))


def assert_equal(found: dict[int, float], expected: Mapping[int, float]) -> None:
    for token in found.keys() | expected.keys():
        assert found.get(token, 0.0) == pytest.approx(expected.get(token, 0.0), abs=2e-6)


def test_equals_enumerating_what_is_known(tokens: TokenMap) -> None:
    model = random_model(tokens.teacher.size, seed=1)
    reference, number = reference_of(tokens, model), 0
    for row in rows_of(tokens, model):
        if row.offset == 0:
            written = tokens.student.token_bytes[row.written] or b""
            expected = reference.at_boundary(row.context, row.text, written)
            assert row.residue == pytest.approx(expected.pop(RESIDUE, 0.0), abs=1e-6)
            assert_equal(row.found, expected)
            number += 1
    assert number > 150


def test_exact_where_no_other_path_is_open(tokens: TokenMap) -> None:
    model = random_model(tokens.teacher.size, seed=2)
    reference, numbers = reference_of(tokens, model), {True: 0, False: 0}
    for row in rows_of(tokens, model):
        if row.offset:
            continue
        others = [u for u in range(tokens.teacher.size) if reference.goes_on((u,)) and u != row.text[0]]
        is_exact = not others and not tokens.tree.is_inner.any()
        numbers[is_exact] += 1
        if is_exact:
            written = tokens.student.token_bytes[row.written] or b""
            assert_equal(row.found, reference.at_boundary(row.context, None, written))
        else:  # what is open stays within the tokens that begin with the same bytes
            by_letter = [collect(tokens, one) for one in (row.found, reference.at_boundary(row.context))]
            assert_equal(*by_letter)
    assert sum(numbers.values()) > 150


def collect(tokens: TokenMap, probabilities: Mapping[int, float]) -> dict[bytes, float]:
    """Return the probabilities of the first byte of the text."""
    found: dict[bytes, float] = defaultdict(float)
    for token, p in probabilities.items():
        if isinstance(token, int):
            found[(tokens.student.token_bytes[token] or b"end")[:1]] += p
    return found


def test_conditional_inside_a_token_of_the_teacher(tokens: TokenMap) -> None:
    model = random_model(tokens.teacher.size, seed=3)
    reference, numbers = reference_of(tokens, model), {True: 0, False: 0}
    for row in rows_of(tokens, model):
        if not row.offset:
            continue
        own = reference.bytes_of(row.text[0])
        expected = reference.inside(row.context, own[: row.offset])
        assert row.residue == pytest.approx(expected.pop(RESIDUE, 0.0), abs=1e-6)
        numbers[row.covered == 1] += 1
        if row.covered > 1:  # the written token takes its part of the token that the text goes on with
            fits = {
                u: p for u, p in enumerate(model(row.context)) if reference.bytes_of(u).startswith(own[: row.offset])
            }
            part = fits[row.text[0]] / sum(fits.values())
            context, rest = (
                [*row.context, row.text[0]],
                tokens.student.token_bytes[row.written][len(own) - row.offset :],
            )
            for u in row.text[1 : row.covered - 1]:
                part *= model(context)[u]
                context, rest = [*context, u], rest[len(reference.bytes_of(u)) :]
            part *= sum(p for u, p in enumerate(model(context)) if reference.bytes_of(u).startswith(rest))
            expected[row.written] += part
            expected[reference.longest(own[row.offset :])] -= part
        assert_equal(row.found, expected)
    if any(len(data or b"") > 1 for data in tokens.teacher.token_bytes):
        assert numbers[True] > 20


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
