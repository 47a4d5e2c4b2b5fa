"""Metrics averaged over response tokens, computed by hand."""

from math import log
from types import SimpleNamespace

import pytest
import torch

from distill_cli.train.step_metrics import TOKEN_METRICS, token_metrics_CN
from distill_cli.types import TeacherScores


def test_token_metrics_by_hand() -> None:
    scores = TeacherScores(torch.tensor([[7, 3]]), torch.tensor([[1 / 2, 1 / 4]]).log(), torch.zeros(1))
    batch = SimpleNamespace(scores=scores)
    output = SimpleNamespace(
        student_logp_NC=torch.tensor([[1 / 4, 1 / 8, 5 / 8]]).log(),
        argmax_N=torch.tensor([7]), entropy_N=torch.tensor([1.5]), loss_N=torch.tensor([0.1]),
    )  # fmt: skip
    values_CN = token_metrics_CN(batch, output)
    assert dict(zip(TOKEN_METRICS, values_CN[:, 0].tolist(), strict=True)) == {
        "train/kl_forward": pytest.approx(0.5 * log(2) + 0.25 * log(2) + 0.25 * log(0.4), rel=1e-5),
        "train/kl_reverse": pytest.approx(0.25 * log(0.5) + 0.125 * log(0.5) + 0.625 * log(2.5), rel=1e-5),
        "train/entropy": 1.5,
        "train/teacher_topk_mass": pytest.approx(0.75),
        "train/student_topk_mass": pytest.approx(0.375),
        "train/top1_agreement": 1,
    }
