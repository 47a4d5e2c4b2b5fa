"""Sequences of several turns through the real command: an environment between real engines, validation as well."""

import pytest

from tests.end_to_end.conftest import SHORT, distill
from tests.end_to_end.naive import check_numbers

GAME = (
    *SHORT[:3], *SHORT[4:-2], "rollout.environment=guess", "rollout.max_turns=3", "rollout.max_sequence_length=256",
    "train.micro_batch_tokens=512", "eval.teacher=false", "eval.max_samples=16", "tracker=none", "train.max_steps=2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.exhaustive
def test_turns_on_one_and_two_ranks(tmp_path) -> None:
    one = distill(tmp_path, *GAME, "rollout.save_scores=true")
    assert one.status == 0, one.stderr
    assert one.run.report.is_file(), one.stdout  # of tokens that have a loss and of those that have none
    check_numbers(one, steps=2)
    rows = one.metrics
    assert 0 <= rows[0]["val/accuracy"] <= 1
    for row in rows[1:]:
        assert 1 < row["rollout/mean_turns"] <= 3  # the student is wrong as often as not, and learns so
        assert row["rollout/accuracy"] + row["rollout/turn_limit_rate"] + row["rollout/truncated_rate"] <= 1.0001
        assert row["rollout/engine_mismatch"] < 1e-4  # the tokens that were sampled are those that are trained on
        assert row["train/response_tokens"] == pytest.approx(row["rollout/mean_length"] * 8)
    off = ("eval.period=0", "eval.at_start=false", "eval.at_end=false")
    two = distill(tmp_path, *GAME, *off, "cluster.ranks_per_node=2", "run.name=two")
    assert two.status == 0, two.stderr
    for ours, theirs in zip(rows[1:], two.metrics[-2:], strict=True):
        assert ours["train/response_tokens"] == theirs["train/response_tokens"]
        assert ours["rollout/mean_turns"] == theirs["rollout/mean_turns"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
