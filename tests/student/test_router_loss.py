"""The routers' auxiliary loss is the family's own."""

from pathlib import Path

import pytest
import torch

from distill_cli.errors import ConfigError
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.rollout.pack import lay_out, plan_batch
from distill_cli.student.model import Student, build_lm
from distill_cli.student.weights import load_weights
from tests.families import make_model, save_model
from tests.student.family_rank import make_step


def student_of(family: str, folder: Path, *, weight: float) -> Student:
    save_model(make_model(family), folder)
    lm, published = build_lm(folder)
    load_weights(lm, published, device=torch.device("cpu"))
    return Student(lm, objective=Objective(DistillLoss(kl_type="mixed")), router_aux_loss=weight)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradient_adds_familys_own(family: str, tmp_path: Path) -> None:
    student, alone = (student_of(family, tmp_path / str(w), weight=w) for w in (0.5, 0.0))
    plain = make_model(family)
    rollouts, scores = make_step(0)
    (row,) = plan_batch([len(rollouts[1].token_ids)], num_ranks=1, max_tokens=99, multiple=64).rows[0]
    batch = lay_out(row, rollouts[1:2], {0: scores[1]})
    assert not batch.is_real.all()  # the rest is padding
    number = torch.tensor(float(batch.num_response_tokens))
    for one in (student, alone):
        one(batch, num_loss_tokens=number)[0].backward()
    ids = torch.tensor([rollouts[1].token_ids])
    (0.5 * plain(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss).backward()
    others = dict(alone.lm.named_parameters())
    found = 0
    for name, param in plain.named_parameters():
        if param.grad is not None:
            added = student.lm.get_parameter(name).grad - others[name].grad
            torch.testing.assert_close(added, param.grad, rtol=1e-3, atol=1e-6, msg=name)
            found += bool(param.grad.abs().max() > 1e-4)
    assert found > 2


def test_row_of_padding_alone(tmp_path: Path) -> None:
    student = student_of("qwen3_moe", tmp_path, weight=0.5)
    rollouts, scores = make_step(0)
    plan = plan_batch([len(rollouts[1].token_ids)], num_ranks=2, max_tokens=99)
    (row,) = plan.rows[1]  # the other rank's has the one sequence
    student(lay_out(row, rollouts[1:2], {0: scores[1]}), num_loss_tokens=torch.tensor(30.0))[0].backward()
    for name, param in student.lm.named_parameters():
        assert param.grad is None or not param.grad.any(), name


def test_family_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="router_aux_loss=0.1: Qwen3ForCausalLM has no auxiliary loss"):
        student_of("qwen3", tmp_path, weight=0.1)
