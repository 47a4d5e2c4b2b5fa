"""The older ways to compare models with different tokenizers, by hand."""

import math
from pathlib import Path

import pytest
import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.teacher_chunk import TopK
from distill_cli.tokens.align import align
from distill_cli.tokens.baselines import by_rank, by_spans
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import TeacherScores
from tests.losses.reference import HeadLoss
from tests.tokens.vocabularies import byte_level, map_of


@pytest.fixture
def tokens(tmp_path: Path) -> TokenMap:
    """The student has ab, the teacher ba."""
    return map_of(byte_level(tmp_path / "s", [("a", "b")]), byte_level(tmp_path / "t", [("b", "a")]))


def scores_of(probs: list[list[float]], ids: list[int], *, topk: int) -> TeacherScores:
    logp = torch.tensor(probs).log()
    top = logp.topk(topk)
    return TeacherScores.of_topk(top.indices.int(), top.values, logp.gather(1, torch.tensor(ids)[:, None])[:, 0])


def test_rank_leaves_out_what_begins_inside(tokens: TokenMap) -> None:
    a, b, ab = (tokens.student.token_of(data) for data in (b"a", b"b", b"ab"))
    alignment = align([b, ab, a], tokens)  # the teacher reads ba b a as b|ab|a
    assert [tokens.teacher.token_bytes[u] for u in alignment.teacher_ids] == [b"ba", b"ba"]
    scores = scores_of([[0.1, 0.2, 0.6, 0.1], [0.5, 0.1, 0.3, 0.1]], alignment.teacher_ids, topk=3)
    found = by_rank(scores, alignment)
    assert found.is_known.tolist() == [True, False, False]
    assert found.topk_ids[0].tolist() == [0, 1, 2]
    assert found.topk_logp[0].exp().tolist() == pytest.approx([0.6, 0.2, 0.1])


def test_rank_compares_sorted_probabilities() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).double()
    teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.2]]).double().log(), torch.zeros(1), by_rank=True)
    loss = HeadLoss(DistillLoss(kl_type="l1"), torch.ones(1).double())
    output = linear_divergence(logits, Head(torch.eye(4).double()), teacher, loss, sampled_ids_N=torch.zeros(1).long())
    q = logits.softmax(-1).sort(descending=True).values[0].tolist()
    assert float(output.loss) == pytest.approx(abs(0.7 - q[0]) + abs(0.2 - q[1]) + abs(0.1 - q[2] - q[3]))


def test_spans_have_the_likelihood_of_their_text(tokens: TokenMap) -> None:
    a, b, ab = (tokens.student.token_of(data) for data in (b"a", b"b", b"ab"))
    answer = [a, b, a, ab]  # a|b|a|ab, and a|ba|a|b for the teacher
    alignment = align(answer, tokens)
    assert [tokens.teacher.token_bytes[u] for u in alignment.teacher_ids] == [b"a", b"ba", b"a", b"b"]
    rows = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.5, 0.2, 0.2], [0.6, 0.2, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1]]
    scores = scores_of(rows, alignment.teacher_ids, topk=4)
    logp = [math.log(0.9), math.log(0.8), math.log(0.5), math.log(0.7)]
    found = by_spans(scores, alignment, answer, logp, tokens, topk=4)
    assert found.is_known.tolist() == [True, True, False, True]
    rows_found = [
        dict(zip(*one, strict=True))
        for one in zip(found.topk_ids.tolist(), found.topk_logp.exp().tolist(), strict=True)
    ]
    assert rows_found[0][a] == pytest.approx(0.7)
    assert rows_found[1][b] == pytest.approx(0.2 / 0.5)  # ba, less the student's a
    assert rows_found[3][ab] == pytest.approx(1 - 0.6 - 0.2 - 0.1, abs=1e-5)  # at most what the others leave
