"""A teacher with a tokenizer of its own, by its hidden states, against dense float64 distributions."""

from pathlib import Path

import pytest
import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.groups import RowGroups, TokenGroups
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.logit_transform import LogitTransform
from distill_cli.losses.own_logits import OwnHead
from distill_cli.losses.teacher_chunk import OwnTeacher, Support, TeacherHidden, TopK
from distill_cli.tokens.align import Alignment, align
from distill_cli.tokens.student_scores import to_student
from distill_cli.tokens.text_plan import TextPlan, own_texts, plan_text
from distill_cli.tokens.token_map import TokenMap
from distill_cli.types import OwnText, TeacherScores
from tests.losses.reference import HeadLoss
from tests.tokens.test_student_scores import PAIRS, written_answers
from tests.tokens.vocabularies import byte_level, map_of

HIDDEN = 8
TRANSFORM = LogitTransform(scale=0.7, soft_cap=6.0)


class Pair:
    """A student, and a teacher with other tokens, of random weights; and some answers."""

    def __init__(self, tokens: TokenMap, *, temperature: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tokens, self.temperature = tokens, temperature
        self.answers = written_answers(tokens, 16)
        self.alignments: list[Alignment] = [align(answer, tokens) for answer in self.answers]
        self.head = Head(draw(tokens.teacher.size, HIDDEN), draw(tokens.teacher.size), TRANSFORM)
        self.hidden = [draw(len(one.teacher_ids), HIDDEN) for one in self.alignments]
        self.written = torch.tensor([token for answer in self.answers for token in answer])
        self.student = draw(len(self.written), HIDDEN).requires_grad_(), draw(tokens.student.size, HIDDEN)
        self.student[1].requires_grad_()

    def run(self, teacher: TopK | TeacherHidden, kl_type: str, weights: torch.Tensor) -> HeadOutput:
        hidden, weight = self.student
        return linear_divergence(
            hidden,
            Head(weight),
            teacher,
            HeadLoss(DistillLoss(kl_type=kl_type), weights),
            sampled_ids_N=self.written,
            temperature=self.temperature,
            chunk_tokens=7,
        )

    def by_hidden(self, support: Support, *, topk: int) -> TeacherHidden:
        parts = zip(self.hidden, own_texts(self.plan, self.tokens), strict=True)
        scores = TeacherScores.cat([TeacherScores.of_hidden(one, text) for one, text in parts])
        assert scores.text is not None
        own = OwnTeacher(scores.text, OwnHead(torch.from_numpy(self.tokens.first), self.tokens.teacher_ids))
        groups = RowGroups.of(self.tokens.groups, scores.text.splits)
        return TeacherHidden(scores.hidden, self.head, self.tokens.student.size, support, topk, own, groups)

    @property
    def plan(self) -> TextPlan:
        return plan_text(self.alignments, self.answers, [len(one) for one in self.hidden], self.tokens)

    @property
    def splits(self) -> torch.Tensor:
        return OwnText.cat(own_texts(self.plan, self.tokens)).splits.long()

    def grouped(self, q_NV: torch.Tensor) -> torch.Tensor:
        """The student's probabilities by the tokens that stand for others at each place."""
        splits, found = self.splits, torch.zeros_like(q_NV)
        for token in range(q_NV.shape[1]):
            ids = torch.full((len(q_NV),), token)
            stands = self.tokens.groups.stand_in(torch.arange(len(q_NV)), ids, splits)
            found = found.scatter_add(1, stands[:, None], q_NV[:, token : token + 1])
        return found

    def by_topk(self) -> TeacherScores:
        """The teacher's whole distribution, as its engine returns it."""
        found = []
        for hidden, alignment in zip(self.hidden, self.alignments, strict=True):
            raw = TRANSFORM.scale * (hidden @ self.head.weight_VH.T + self.head.bias_V)
            logits = TRANSFORM.soft_cap * (raw / TRANSFORM.soft_cap).tanh()
            logp = (logits / self.temperature).log_softmax(-1)
            top, own = logp.topk(logp.shape[1]), logp.gather(1, torch.tensor(alignment.teacher_ids)[:, None])[:, 0]
            found.append(TeacherScores.of_topk(top.indices.int(), top.values, own))
        size = self.tokens.student.size
        return TeacherScores.cat(to_student(found, self.alignments, self.answers, self.tokens, topk=size))

    def reference(self, support: str, kl_type: str, *, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence at each token, from dense distributions: classes are the support and all other tokens.

        And whether both models give the rest something: else it is rounding.
        """
        scores, (hidden, weight) = self.by_topk(), self.student
        q_NV = self.grouped((hidden @ weight.T / self.temperature).softmax(-1))
        p_NV = torch.zeros_like(q_NV)
        rows, columns = (scores.topk_ids >= 0).nonzero(as_tuple=True)
        p_NV[rows, scores.topk_ids[rows, columns].long()] = scores.topk_logp[rows, columns].double().exp()
        values, are_clear = [], []
        for p_V, q_V in zip(p_NV, q_NV, strict=True):
            theirs, ours = p_V.topk(topk).indices.tolist(), q_V.topk(topk).indices.tolist()
            ids = {"teacher": theirs, "student": ours, "union": theirs + ours, "full": range(len(p_V))}[support]
            ids = sorted({token for token in ids if p_V[token] > 0})
            p_C = torch.cat([p_V[ids], (1 - p_V[ids].sum())[None].clamp_min(1e-30)])
            rest = [token for token in range(len(q_V)) if token not in ids]
            q_C = torch.cat([q_V[ids], q_V[rest].sum()[None]])
            values.append(DIVERGENCES[kl_type](p_C.log(), q_C.log()).sum())
            are_clear.append(bool(p_C[-1] > 1e-3) and len(rest) > 0)
        return torch.stack(values), torch.tensor(are_clear)


@pytest.fixture(params=PAIRS)
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> TokenMap:
    return map_of(*(byte_level(tmp_path / str(index), merges) for index, merges in enumerate(PAIRS[request.param])))


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("kl_type", DIVERGENCES)
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.exhaustive), 0.7])
def test_loss_and_gradient_equal_dense(tokens: TokenMap, support: Support, kl_type: str, temperature: float) -> None:
    pair = Pair(tokens, temperature=temperature)
    expected, is_clear = pair.reference(support, kl_type, topk=1)
    assert float(is_clear.double().mean()) > 0.2
    output = pair.run(pair.by_hidden(support, topk=1), kl_type, is_clear.double())
    torch.testing.assert_close(output.divergence_N[is_clear], expected[is_clear], rtol=1e-5, atol=1e-5)
    assert_gradients(pair, output.loss, expected[is_clear].sum())


@pytest.mark.parametrize("kl_type", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_k_equals_dense(tokens: TokenMap, kl_type: str, temperature: float) -> None:
    """By what the engine returns, brought to the student's tokens before the head."""
    pair = Pair(tokens, temperature=temperature)
    expected, is_clear = pair.reference("teacher", kl_type, topk=1)
    scores = pair.by_topk().first(1)
    assert scores.text is not None
    groups = RowGroups.of(tokens.groups, scores.text.splits)
    known = TopK(scores.topk_ids.long(), scores.topk_logp.double(), scores.sampled_logp.double(), groups)
    output = pair.run(known, kl_type, is_clear.double())
    torch.testing.assert_close(output.divergence_N[is_clear], expected[is_clear], rtol=1e-5, atol=1e-5)
    assert_gradients(pair, output.loss, expected[is_clear].sum())
    own = (pair.student[0] @ pair.student[1].T).log_softmax(-1).gather(1, pair.written[:, None])[:, 0]
    torch.testing.assert_close(output.sampled_logp_N, own.detach(), rtol=1e-6, atol=1e-6)


def assert_gradients(pair: Pair, loss: torch.Tensor, expected: torch.Tensor) -> None:
    found = torch.autograd.grad(loss, pair.student)
    right = torch.autograd.grad(expected, pair.student)
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_padding_stands_for_itself() -> None:
    groups = TokenGroups(torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([1]))
    splits = torch.tensor([[0, 3, 2], [1, 2, 2]])
    rows, tokens = torch.tensor([[0], [1]]), torch.tensor([[1, 2, 3, -1], [1, 2, 3, -1]])
    # A padding of row 1 has the key of token 3 in row 0.
    assert groups.stand_in(rows, tokens, splits).tolist() == [[1, 1, 2, -1], [1, 2, 3, -1]]


@pytest.mark.parametrize("kl_type", DIVERGENCES)
def test_full_has_a_class_of_what_no_token_has(tokens: TokenMap, kl_type: str) -> None:
    pair = Pair(tokens)
    expected, is_clear = pair.reference("full", kl_type, topk=1)
    output = pair.run(pair.by_hidden("full", topk=1), kl_type, is_clear.double())
    torch.testing.assert_close(output.divergence_N[is_clear], expected[is_clear], rtol=1e-5, atol=1e-5)
    if is_clear.any():
        assert_gradients(pair, output.loss, expected[is_clear].sum())


@pytest.mark.parametrize("kl_type", DIVERGENCES)
def test_full_equals_top_k_of_all(tokens: TokenMap, kl_type: str) -> None:
    """Where the teacher leaves nothing to a rest: what it has of nothing is rounding, and reverse terms read it."""
    pair = Pair(tokens)
    scores = pair.by_topk()
    keep = scores.alignment[:, 1] == 0
    if kl_type in ("reverse", "mixed", "skew_reverse"):
        stand = pair.grouped(torch.ones(len(keep), tokens.student.size)) > 0
        keep &= (scores.topk_ids >= 0).sum(1) == stand.sum(1)
    outputs = [
        pair.run(pair.by_hidden(support, topk=tokens.student.size), kl_type, keep.double())
        for support in ("full", "teacher")
    ]
    torch.testing.assert_close(outputs[0].divergence_N[keep], outputs[1].divergence_N[keep], rtol=1e-6, atol=1e-6)
    assert_gradients(pair, outputs[0].loss, outputs[1].loss)
