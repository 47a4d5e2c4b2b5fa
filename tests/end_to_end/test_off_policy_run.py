"""Mixtures of the student's, the teacher's and the dataset's answers through the real command."""

import pytest

from tests.end_to_end.conftest import SHORT, distill
from tests.end_to_end.naive import check_numbers


@pytest.mark.slow
@pytest.mark.exhaustive
def test_teacher_and_dataset_sequences(tmp_path) -> None:
    off = ("data.validation=null", "tracker=none", "train.max_steps=2", "rollout.save_scores=true")
    mixed = ("rollout.on_policy_fraction=0.5", "rollout.off_policy=teacher")
    half = distill(tmp_path, *SHORT[1:], *off, *mixed)
    assert half.status == 0, half.stderr
    check_numbers(half, steps=2)
    for row in half.metrics[-2:]:
        assert row["rollout/on_policy_fraction"] == 0.5
        assert row["rollout/engine_mismatch"] < 1e-4
        assert row["train/loss"] > 0
    supervised = ("loss=sft", "loss.temperature=1", "loss.divergence_weight=0.5")
    dataset = distill(tmp_path, *SHORT[1:], *off, "rollout.on_policy_fraction=0", "run.name=dataset", *supervised)
    assert dataset.status == 0, dataset.stderr
    check_numbers(dataset, steps=1)
    for row in dataset.metrics[-2:]:
        assert row["rollout/on_policy_fraction"] == 0
        assert "rollout/engine_mismatch" not in row
        assert row["train/loss"] > 0
        assert row["train/teacher_topk_mass"] > 0.9
