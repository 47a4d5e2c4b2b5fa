"""Teachers with a loss and a temperature of their own: each token's loss is its teacher's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.rollout.pack import MicroBatch, lay_out, plan_batch
from distill_cli.student.model import Student, build_lm
from distill_cli.student.weights import load_weights
from distill_cli.types import Target
from tests.families import make_model, save_model
from tests.student.family_rank import make_step

RUNS, FIRST, SECOND = ("mixed", 1.0), ("reverse", 1.0), ("forward", 2.0)
"""Kind and temperature."""


def loss_of(kind: str, temperature: float) -> Objective:
    return Objective(DistillLoss(kl_type=kind), temperature)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder: Path = tmp_path_factory.mktemp("student")
    save_model(make_model("qwen3"), folder)
    lm, published = build_lm(folder)
    load_weights(lm, published, device=torch.device("cpu"))
    return Student(lm, objective=loss_of(*RUNS))


def make_batch() -> MicroBatch:
    """Three teachers' sequences in one row; those of the third have the run's loss."""
    rollouts, scores = make_step(0)
    rollouts = [
        replace(rollout, prompt=replace(rollout.prompt, targets=(Target(place % 3),)))
        for place, rollout in enumerate(rollouts)
    ]
    plan = plan_batch([len(rollout.token_ids) for rollout in rollouts], num_ranks=1, max_tokens=10_000)
    return lay_out(plan.rows[0][0], rollouts, dict(enumerate(scores.values() if isinstance(scores, dict) else scores)))


def run(student: Student, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's loss and log-probabilities, and the gradient of the head."""
    student.zero_grad()
    loss, output = student(batch, num_loss_tokens=torch.tensor(7.0), num_top=2, with_classes=True)
    loss.backward()
    assert loss.isclose(output.loss_N.sum())
    return output.loss_N, output.student_logp_NC, student.lm.get_output_embeddings().weight.grad.clone()


@pytest.mark.parametrize("second", [("forward", 1.0), SECOND])
def test_losses_and_gradients_add_up(student: Student, second: tuple[str, float]) -> None:
    batch, expected, logp, grads = make_batch(), {}, {}, {}
    for teacher, own in {1: FIRST, 2: second, 4: RUNS}.items():
        student.objective, student.own_objectives = loss_of(*own), {}
        mine = batch.teachers == teacher
        loss_N, logp_NC, _ = run(student, batch)
        expected[teacher], logp[teacher] = loss_N[mine], logp_NC[mine]
        names = ("sampled_ids", "sampler_logp", "has_sampler_logp", "trained_places", "advantages")
        keep = {name: getattr(batch, name)[mine] for name in names}
        keep |= {"rows": batch.rows[mine], "scores": batch.scores.take(mine), "teachers": batch.teachers[mine]}
        part = replace(batch, **keep)
        grads[teacher] = run(student, part)[2]
    student.objective, student.own_objectives = loss_of(*RUNS), {1: loss_of(*FIRST), 2: loss_of(*second)}
    loss_N, logp_NC, grad = run(student, batch)
    for teacher in expected:
        torch.testing.assert_close(loss_N[batch.teachers == teacher], expected[teacher])
        torch.testing.assert_close(logp_NC[batch.teachers == teacher], logp[teacher])
    torch.testing.assert_close(grad, sum(grads.values()), rtol=1e-4, atol=1e-7)


def test_batch_without_tokens_has_no_loss(student: Student) -> None:
    student.own_objectives = {1: loss_of(*FIRST), 2: loss_of(*SECOND)}
    (row,) = plan_batch([5], num_ranks=2, max_tokens=99).rows[1]
    loss, output = student(lay_out(row, make_step(0)[0][:1], {}), num_loss_tokens=torch.tensor(1.0))
    loss.backward()
    assert (float(loss.detach()), output.loss_N.numel()) == (0.0, 0)
