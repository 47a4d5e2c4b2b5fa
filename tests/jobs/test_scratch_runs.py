"""What the rows of a short run measure, and what a run is expected to take."""

from dataclasses import replace

import pytest

from distill_cli.config.compose import compose
from distill_cli.errors import DistillError
from distill_cli.jobs.plan_tables import expected_rows, num_validations
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.scratch_runs import Pace, pace, short
from distill_cli.track.base import enabled


def row(step: int, time: float, total: float, **more: float) -> dict[str, float]:
    stages = {"time/sync_s": 0.1, "time/sample_s": 1.0, "time/score_s": 0.5, "time/train_s": 2.0}
    return {"step": step, "time": time, "time/step_s": total, "rollout/mean_length": 30.0, **stages, **more}


BASELINE = {"step": 0, "time": 130.0, "time/eval_s": 7.0}
LAST = {"time/eval_s": 5.0, "time/record_s": 1.5, "time/checkpoint_s": 0.2, "val/accuracy": 0.5}


def test_first_step_warms_up() -> None:
    rows = [BASELINE, row(1, 140, 9), row(2, 144, 3.9), row(3, 148, 3.7), {**row(4, 160, 20), **LAST}]
    found = pace(rows, began=100.0)
    assert found.steps == (3.9, 3.7)
    assert found.step == pytest.approx(3.8)
    assert found.stages["other"] == pytest.approx(0.2)
    assert (found.validation, found.teacher_validation, found.checkpoint) == (6.5, 7.0, 0.2)
    assert found.start == pytest.approx(140 - 100 - 9 - 7)


def test_one_step_is_enough() -> None:
    found = pace([{"step": 0, "time": 10.0}, {**row(1, 20, 4), **LAST}], began=0.0)
    assert found.steps == (4,)
    assert found.teacher_validation is None
    with pytest.raises(DistillError, match="before its first step"):
        pace([{"step": 0, "time": 10.0}], began=0.0)


def test_a_run_sums_its_parts() -> None:
    found = preflight(compose(["train.max_steps=50", "eval.period=20", "checkpoint.period=10"])[0].config)
    measured = Pace(60.0, {"sample": 2.0, "train": 4.0}, (6.0,), 30.0, 40.0, 1.0, 30.0)
    assert num_validations(found.config, 50) == 4  # at the start, 20, 40, the end
    rows = expected_rows(replace(found, num_train_rows=6400), measured)
    assert rows["an epoch"] == "10:00 for 100 steps"
    # 60 + 40 + 50 x 6 + 4 x 30 + 5 x 1 = 525 s
    assert rows["the run"] == "8:45 (start 1:40, 50 steps 5:00, validations 2:00, checkpoints 0:05)"


def test_only_the_length_is_cut() -> None:
    config = compose(["loss.topk=8", "rollout.prompts_per_step=16", "train.global_batch_size=16"])[0].config
    cut = short(preflight(config)).config
    assert (cut.train.max_steps, cut.loss.topk, cut.rollout.prompts_per_step) == (4, 8, 16)
    assert not enabled(cut)
    assert config.train.max_steps == 100
