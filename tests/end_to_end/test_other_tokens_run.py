"""Runs whose teacher has a tokenizer of its own."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import SHORT, Finished, distill

pytestmark = pytest.mark.slow

OTHER = ("model=tiny_other", "cluster.ranks_per_node=1", "tracker=none")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return distill(
        tmp_path_factory.mktemp("other"), *OTHER, *SHORT, "rollout.save_scores=true", "rollout.carry_over=true"
    )


@pytest.mark.exhaustive
def test_the_student_learns_from_other_tokens(other: Finished) -> None:
    assert other.status == 0, other.stderr
    assert other.metrics[0]["val/teacher_accuracy"] > 0.95
    for row in other.metrics[1:]:
        assert 0.5 < row["train/aligned_rate"] < 1
        assert row["train/left_out_rate"] == 0
        assert 0 <= row["train/residual_mass"] < 0.2


@pytest.mark.exhaustive
def test_a_replay_equals_its_run(other: Finished) -> None:
    replay = distill(other.folder, "replay", str(other.run.path), "run.name=again", "tracker=none")
    assert replay.status == 0, replay.stderr
    replayed = {row["step"]: row for row in replay.metrics}
    for recorded in other.metrics[1:]:
        for key in ("train/loss", "train/aligned_rate", "train/residual_mass"):
            assert replayed[recorded["step"]][key] == recorded[key]


@pytest.mark.exhaustive
def test_a_replay_keeps_its_alignment(other: Finished) -> None:
    refused = distill(other.folder, "replay", str(other.run.path), "run.name=gold", "tracker=none", "loss=gold")
    assert refused.status == 2
    assert "loss.alignment=spans: the tokens of model.teacher were aligned by bytes" in refused.stderr


@pytest.mark.exhaustive
def test_the_same_tokenizer_changes_nothing(tmp_path: Path) -> None:
    runs = [
        distill(
            tmp_path,
            *SHORT,
            "cluster.ranks_per_node=1",
            "tracker=none",
            f"run.name={name}",
            f"model.teacher.tokenizer={name}",
        )
        for name in ("student", "own")
    ]
    for one, other in zip(*(run.metrics[1:] for run in runs), strict=True):
        for key in ("train/loss", "train/kl_forward", "train/kl_reverse", "train/grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
        assert (other["train/aligned_rate"], other["train/residual_mass"]) == (1.0, 0.0)
