"""Both models' predictions at recorded tokens."""

from math import log
from types import SimpleNamespace

import pytest
import torch

from distill_cli.losses.distill_loss import PADDING_LOGP, DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.losses.teacher_chunk import TeacherHidden, TopK
from distill_cli.train.token_report import compared, token_values
from tests.losses.reference import HeadLoss

TEACHER = torch.tensor([[0.4, 0.3, 0.1, 0.08, 0.07, 0.05]])
STUDENT = torch.tensor([[0.5, 0.01, 0.02, 0.3, 0.07, 0.1]])
"""Top-3: 0, 1, 2 and 0, 3, 5. The teacher gives the student's 0.4 + 0.08 + 0.05."""


def test_padding_is_no_token() -> None:
    logp_12 = torch.tensor([[-0.1, PADDING_LOGP]])
    one = torch.zeros(1)
    output = SimpleNamespace(
        loss_N=one, entropy_N=one, sampled_logp_N=one, teacher_sampled_logp_N=one, kl_forward_N=one, kl_reverse_N=one,
        teacher_top_ids_NM=torch.tensor([[7, PADDING_ID]]), teacher_top_logp_NM=logp_12,
        top_ids_NM=torch.tensor([[7, 3]]), top_logp_NM=torch.tensor([[-0.2, -2.0]]),
    )  # fmt: skip
    ((*_, teacher_ids, teacher_logp),) = token_values(output)
    assert (teacher_ids, teacher_logp) == ([7], [logp_12[0, 0].item()])


def head_output(teacher: TopK | TeacherHidden, *, num_top: int = 5) -> HeadOutput:
    """The embedded pair's place is taken by heads that hand on their input as logits."""
    loss, head = HeadLoss(DistillLoss(kl_type="mixed")), Head(torch.eye(6))
    return linear_divergence(
        STUDENT.log(), head, teacher, loss, sampled_ids_N=torch.zeros(1, dtype=torch.int64), num_top=num_top
    )


def of_topk(topk: int) -> TopK:
    probabilities, ids = TEACHER.topk(topk)
    return TopK(ids, probabilities.log(), torch.zeros(1))


def of_hidden(support: str, topk: int = 3) -> TeacherHidden:
    return TeacherHidden(TEACHER.log(), Head(torch.eye(6)), vocab_size=6, support=support, topk=topk)


def test_overlap_and_teachability_by_hand() -> None:
    found = compared(head_output(of_topk(3)), topk=3)
    assert found["topk_overlap"].item() == pytest.approx(1 / 3)
    assert found["teachability"].item() == pytest.approx(0.4)  # of the tokens in both
    assert found["top1_agreement"].item() == 1
    assert found["teacher_entropy"].item() == pytest.approx(-sum(p * log(p) for p in (0.4, 0.3, 0.1, 0.2)))
    assert found["entropy"].item() == pytest.approx(-float((STUDENT * STUDENT.log()).sum()), rel=1e-5)
    assert compared(head_output(of_topk(1)), topk=1)["topk_overlap"].item() == 1


@pytest.mark.parametrize("support", ["teacher", "student", "union", "full"])
def test_hidden_states_give_exact_teachability(support: str) -> None:
    found = compared(head_output(of_hidden(support)), topk=3)
    assert found["topk_overlap"].item() == pytest.approx(1 / 3)
    assert found["teachability"].item() == pytest.approx(0.53)
    assert found["teacher_entropy"].item() == pytest.approx(-float((TEACHER * TEACHER.log()).sum()), rel=1e-5)


def test_training_computes_no_teachability() -> None:
    output = head_output(of_topk(3), num_top=0)
    assert output.teachability_N.shape == (1, 0)


def test_five_tokens_are_written() -> None:
    ((*_, own_ids, own_logp, teacher_ids, teacher_logp),) = token_values(head_output(of_topk(6), num_top=6))
    assert own_ids == [0, 3, 5, 4, 2]
    assert teacher_ids == [0, 1, 2, 3, 4]
    assert len(own_logp) == len(teacher_logp) == 5
