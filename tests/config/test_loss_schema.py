"""How a loss is described in a line: in the first panel, the report and the model card."""

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.loss_schema import describe_loss
from distill_cli.config.variation import plain


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "mixed, the teacher's top-64, tail bucket"),
        (["loss=reverse", "loss.topk=8", "loss.tail=zero"], "reverse, the teacher's top-8, tail zero"),
        (["loss.support=student"], "mixed, the student's top-64, tail bucket"),
        (["loss.support=union"], "mixed, both models' top-64, tail bucket"),
        (["loss.support=full"], "mixed, the whole vocabulary"),
        (["loss=uld", "model=tiny_other"], "l1, both models' top-64 by rank"),
        (["loss=sft", "rollout.on_policy_fraction=0", "rollout.off_policy=dataset"], "supervised"),
        (["loss=policy_gradient"], "policy gradient"),
        (["loss.reward=0.1"], "mixed, the teacher's top-64, tail bucket + reward"),
    ],
)
def test_a_line_names_what_is_compared(overrides: list[str], expected: str) -> None:
    (job,) = compose(overrides)
    assert describe_loss(plain(job.config)) == expected


def test_parameters_are_named_if_given() -> None:
    (job,) = compose(["loss.support=full"])
    assert describe_loss(plain(job.config), job.config.loss.parameters) == "mixed, kl_weight 0.5, the whole vocabulary"
