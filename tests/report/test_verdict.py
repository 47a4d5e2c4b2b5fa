"""What is said of runs whose metrics are made by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from distill_cli.report.verdict import MIN_STEPS, MOST_LINES, trend, verdict

CONFIG: dict[str, Any] = {
    "loss.kl_type": "mixed", "loss.topk": 64, "loss.support": "teacher", "rollout.max_new_tokens": 512,
    "rollout.temperature": 1.0, "rollout.replay": None, "rollout.guard_above": None, "rollout.environment": None,
    "train.max_grad_norm": 1.0, "train.lr": 1e-3,
}  # fmt: skip
SOUND = {
    "train/kl_forward": 0.3, "train/kl_reverse": 0.4, "train/entropy": 0.5, "train/teacher_entropy": 0.4,
    "train/top1_agreement": 0.85, "train/student_topk_mass": 0.99, "train/grad_norm": 0.5,
    "rollout/mean_length": 100.0, "rollout/truncated_rate": 0.02,
}  # fmt: skip
BEFORE = {"step": 0, "val/accuracy": 0.2, "val/teacher_accuracy": 0.7, "probe/kl_forward": 0.4}


def rows(number: int = 20, before: dict[str, Any] | None = None, **changes: Callable[[int], Any]) -> list[dict]:
    """Rows of steps in which all is well but for these metrics, given by step."""
    made = [{"step": step, **SOUND} for step in range(1, number + 1)]
    for row in made:
        row |= {key.replace("__", "/"): value(row["step"]) for key, value in changes.items()}
    return [before or {"step": 0}, *made]


def only(found: list[dict], **config: Any) -> str:
    """The first sentence."""
    return verdict(found, CONFIG | {key.replace("__", "."): value for key, value in config.items()})[0]


def test_nothing_wrong_is_one_sentence() -> None:
    first, gain = verdict(rows(), CONFIG)
    assert first == "Nothing looks wrong in these 20 steps."
    assert gain.startswith("No evidence of a gain yet (forward KL of the sampled answers: 0.3 to 0.3 nats)")


def test_few_steps_have_no_verdict() -> None:
    assert verdict(rows(MIN_STEPS - 1, train__student_topk_mass=lambda step: 0.1), CONFIG) == []
    assert verdict([], CONFIG) == []
    assert verdict(rows(MIN_STEPS), CONFIG) != []


def test_slopes_ignore_outliers_and_noise() -> None:
    line = [(step, 100 + 4.0 * step) for step in range(11)]
    line[5] = (5, 1000.0)
    found = trend(line)
    assert (found.start, found.end, found.num_steps, found.is_clear) == (100, 140, 10, True)
    assert found.growth == pytest.approx(0.04)
    assert not trend([(step, (-1) ** step) for step in range(20)]).is_clear
    assert not trend([(1, 1.0), (2, 2.0), (3, 3.0)]).is_clear  # one order of six
    assert trend([(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]).is_clear  # one of 24
    assert trend([(1, 1.0), (2, 2.0)]) is None


def test_growing_answers() -> None:
    growing = rows(11, rollout__mean_length=lambda step: 100 + 4.0 * (step - 1))
    sentence = only(growing)
    assert sentence.startswith("Answers grow 4.0% a step, from 100 to 140 tokens in 10 steps: raise rollout.max_new_t")
    assert "rollout.guard_above" in sentence
    guarded = only(growing, rollout__guard_above=0.3, rollout__guard_share=0.5)
    assert guarded.endswith("or lower rollout.guard_above=0.3, or raise rollout.guard_share=0.5.")
    assert "guard" not in only(growing, rollout__environment="guess")
    assert only(growing, rollout__replay="runs/x").startswith("Nothing")
    assert only(rows(rollout__mean_length=lambda step: 100 + 7 * (-1) ** step)).startswith("Nothing")
    assert only(rows(rollout__mean_length=lambda step: 100 + 0.1 * step)).startswith("Nothing")


def test_rising_truncation_comes_first() -> None:
    found = rows(
        rollout__truncated_rate=lambda step: 0.01 * step,
        rollout__mean_length=lambda step: 100.0 * step,
        train__student_topk_mass=lambda step: 0.5,
    )
    first, second, *_ = verdict(found, CONFIG)
    assert first.startswith("Answers cut off at their length limit rise from 1% to 20% in 19 steps")
    assert "top" in second or "outside" in second  # growth is not said twice
    constant = only(rows(rollout__truncated_rate=lambda step: 0.4))
    assert constant.startswith("40% of answers are cut off at their length limit: raise rollout.max_new_tokens=512")


def test_collapsed_entropy() -> None:
    fallen: dict[str, Callable] = {"train__entropy": lambda step: 0.5 if step < 10 else 0.05}
    sentence = only(rows(**fallen))
    assert sentence.startswith("The student's entropy fell from 0.5 to 0.05 nats, the teacher has 0.4, and KL")
    assert "loss=forward" in sentence
    assert "rollout.temperature=1.0" in sentence
    learns = {"train__kl_forward": lambda step: 1 / step}
    assert only(rows(**fallen, **learns)).startswith("Nothing")  # KL falls
    assert only(rows(**fallen, train__teacher_entropy=lambda step: 0.04)).startswith("Nothing")  # so is the teacher
    assert only(rows(**fallen, train__teacher_entropy=lambda step: None)).startswith("The student's entropy")


def test_mass_outside_the_support() -> None:
    found = rows(train__student_topk_mass=lambda step: 0.75)
    assert only(found) == (
        "25% of the student's probability is outside the tokens that loss.support=teacher compares: "
        "set loss.support=union or full, or a larger loss.topk=64."
    )
    assert only(found, loss__support="union").endswith("set a larger loss.topk=64.")
    assert ": set loss.tail=bucket, loss.support=union" in only(found, loss__tail="renormalize")


def test_tokens_that_the_teacher_lacks() -> None:
    assert only(rows(train__left_out_rate=lambda step: 0.125)).startswith("12% of sampled tokens have no loss")
    assert only(rows(train__left_out_rate=lambda step: 0.01)).startswith("Nothing looks wrong")


def test_low_teachability() -> None:
    found = rows(probe__teachability=lambda step: 0.6 if step % 10 == 0 else None, probe__topk_overlap=lambda step: 0.3)
    sentence = only(found)
    assert "student's top-64 only 60% of its probability (30% of both top-k overlap)" in sentence
    assert "rollout.off_policy=teacher" in sentence
    assert "model.teacher.path" in sentence


def test_little_to_learn() -> None:
    agreed: dict[str, Callable] = {
        "train__top1_agreement": lambda step: 0.984,
        "train__kl_forward": lambda step: 0.01,
        "train__kl_reverse": lambda step: 0.2,
    }
    sentence = only(rows(**agreed))
    assert sentence.startswith("The student agreed on 98.4% of tokens from the start (KL 0.01 nats): little to learn")
    assert only(rows(**agreed), loss__kl_type="reverse").startswith("Nothing")
    assert only(rows(before=BEFORE, **agreed)).startswith("Nothing")  # few tokens decide: the teacher is much better


def test_clipped_gradients() -> None:
    sentence = only(rows(train__grad_norm=lambda step: 0.5 if step == 1 else 3.0))
    assert sentence.startswith("The gradient is clipped in 19 of 20 steps (norm 3, train.max_grad_norm=1)")
    assert "train.lr=0.001" in sentence
    assert only(rows(train__grad_norm=lambda step: 3.0 if step % 2 else 0.5)).startswith("Nothing")


def gain(found: list[dict]) -> str:
    return verdict(found, CONFIG)[-1]


def test_gain_follows_the_kl() -> None:
    learns: dict[str, Callable] = {"train__kl_forward": lambda step: 0.3 - 0.01 * step}
    probed = {"probe__kl_forward": lambda step: 0.1 if step == 20 else None}
    assert gain(rows(before=BEFORE, **learns, **probed)) == (
        "75% of the KL is gone (forward KL of the recorded prompts: 0.4 to 0.1 nats), and it still falls; "
        "accuracy 57% if it follows the KL (20% before, the teacher 70%)."  # 0.2 + 0.75 x 0.5
    )
    measured = {"val__accuracy": lambda step: 0.6 if step == 20 else None}
    assert "; 80% of the gap in accuracy is closed." in gain(rows(before=BEFORE, **learns, **probed, **measured))
    assert "not measured (data.validation, eval.teacher)" in gain(rows(**learns))
    assert "of the sampled answers: 0.27 to 0.12 nats" in gain(rows(**learns))
    assert gain(rows(train__kl_forward=lambda step: 0.3 + 0.01 * step)).endswith("lower train.lr.")


def test_at_most_four_lines() -> None:
    found = rows(
        rollout__truncated_rate=lambda step: 0.5,
        train__entropy=lambda step: 0.5 if step < 10 else 0.05,
        train__student_topk_mass=lambda step: 0.5,
        probe__teachability=lambda step: 0.5,
        train__grad_norm=lambda step: 3.0,
    )
    assert len(verdict(found, CONFIG)) == MOST_LINES
