"""Metrics averaged over response tokens, computed by hand."""

from math import log

import pytest
import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.teacher_chunk import TopK
from distill_cli.train.step_metrics import TOKEN_METRICS, token_metrics_CN
from tests.losses.reference import HeadLoss


def test_token_metrics_by_hand() -> None:
    teacher = TopK(torch.tensor([[7, 3]]), torch.tensor([[1 / 2, 1 / 4]]).log(), torch.zeros(1))
    student = torch.tensor([[5 / 16, 1e-30, 5 / 16, 1 / 8, 1e-30, 1e-30, 1e-30, 3 / 8]])
    student[0, 7], student[0, 0] = 1 / 4, 5 / 16
    output = linear_divergence(
        student.div(student.sum()).log(),
        Head(torch.eye(8)),
        teacher,
        HeadLoss(DistillLoss(kl_type="mixed")),
        sampled_ids_N=torch.tensor([7]),
    )
    values_CN, p, q = token_metrics_CN(output), (1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 8, 5 / 8)
    assert (
        dict(zip(TOKEN_METRICS, values_CN[:, 0].tolist(), strict=True))
        == {
            "train/kl_forward": pytest.approx(0.5 * log(2) + 0.25 * log(2) + 0.25 * log(0.4), rel=1e-5),
            "train/kl_reverse": pytest.approx(0.25 * log(0.5) + 0.125 * log(0.5) + 0.625 * log(2.5), rel=1e-5),
            "train/entropy": pytest.approx(-sum(one * log(one) for one in (1 / 4, 1 / 8, 5 / 16, 5 / 16)), rel=1e-5),
            "train/teacher_entropy": pytest.approx(1.5 * log(2), rel=1e-5),  # of 1/2, 1/4 and the rest, 1/4
            "train/teacher_topk_mass": pytest.approx(sum(p[:2])),
            "train/student_topk_mass": pytest.approx(sum(q[:2])),
            "train/top1_agreement": 0,
        }
    )
