"""Metrics averaged over response tokens, computed by hand."""

from dataclasses import replace
from math import log
from types import SimpleNamespace

import pytest
import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.teacher_chunk import TopK
from distill_cli.rollout.pack import lay_out, plan_batch
from distill_cli.train.step_metrics import TOKEN_METRICS, alignment_metrics, token_metrics_CN
from distill_cli.types import Example, Prompt, Rollout, Sample, Target, TeacherScores
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


def test_alignment_is_of_other_tokens_alone() -> None:
    """Answers of two teachers in a row; the second one has other tokens, and says nothing of one of three."""

    def scored(teacher: int, *ids: int) -> tuple[Rollout, TeacherScores]:
        prompt = Prompt(0, [1], Example("q"), (Target(teacher),))
        top = torch.tensor(ids, dtype=torch.int32)[:, None]
        scores = TeacherScores.of_topk(top, torch.zeros(len(ids), 1), torch.zeros(len(ids)))
        return Rollout(prompt, Sample([4] * len(ids), None, "stop", source="teacher")), scores

    (one, shared), (other, own) = scored(0, 5, 5, 5, 5), scored(1, 5, -1, 5)
    own = replace(own, alignment=torch.tensor([[1.0, 0.1], [0.0, 0.0], [0.0, 0.3]]))
    ((row,),) = plan_batch([5, 4], num_ranks=1, max_tokens=16).rows
    batch = lay_out(row, [one, other], {0: shared, 1: own})
    result = SimpleNamespace(outputs=[SimpleNamespace(residue_N=torch.zeros(6))])
    parallel = SimpleNamespace(device=torch.device("cpu"), all_sum=lambda sums: sums)
    found = alignment_metrics([([batch], result)], [one, other], [1], parallel=parallel)
    expected = {"train/aligned_rate": 1 / 2, "train/residual_mass": 0.4 / 2, "train/left_out_rate": 1 / 3}
    assert found == pytest.approx(expected)
    assert alignment_metrics([([batch], result)], [one, other], [], parallel=parallel) == {}
