"""The declarations of metrics: complete, consistent, and what each part of the program makes of them."""

import json
from pathlib import Path

import pytest

from distill_cli.config.checks import config_problems
from distill_cli.config.compose import compose
from distill_cli.config.fields import declared_keys
from distill_cli.config.schema import Config
from distill_cli.metrics import METRICS, SECTIONS, STAGES, find
from distill_cli.report.figures import lines
from distill_cli.terminal.step_printer import Screen, step_line

RECORDED = Path(__file__).parent / "end_to_end/numbers.json"


def test_every_metric_is_described() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.meaning, metric.name
        assert metric.figure is None or (metric.figure.section in SECTIONS and (metric.series or metric.label))
        assert not metric.compared_in or metric.label, metric.name
        assert "heat map" not in metric.compared_in or metric.better, metric.name


def test_figures_have_one_unit() -> None:
    units: dict[str, set[str]] = {}
    for metric in METRICS:
        if metric.figure:
            units.setdefault(metric.figure.id, set()).add(metric.unit)
    assert {figure: len(found) for figure, found in units.items()} == dict.fromkeys(units, 1)


def test_every_recorded_key_is_declared() -> None:
    """Those of the recorded runs: default, adapters, two ranks, resumed, replayed, swept."""
    runs = [run for runs in json.loads(RECORDED.read_text())["runs"].values() for run in runs.values()]
    keys = {key for run in runs for row in run["metrics"].values() for key in row}
    assert {"train/loss", "val/accuracy", "rollout/drift"} <= keys
    assert {key for key in keys if find(key) is None} == set()


def test_needed_keys_are_keys() -> None:
    needed = {key for metric in METRICS for key in metric.needs.split(" or ")}
    assert needed - {""} <= declared_keys(Config).keys()


def test_families_cover_unpredictable_metrics() -> None:
    assert find("val/aime24/accuracy").name == "val/<dataset>/accuracy"
    assert find("val/openai/gsm8k/accuracy").name == "val/<dataset>/accuracy"
    assert find("val/accuracy").name == "val/accuracy"
    assert find("val//accuracy") is None
    assert all(find(f"time/{stage}_s") for stage in STAGES)


def problems_with(*overrides: str) -> list[str]:
    (job,) = compose(overrides)
    return config_problems(job.config)


@pytest.mark.parametrize(
    "typed",
    [
        "val/aime24/accuracy",
        "val/accuracy",
        "rollout/verifier_errors",
        "train/loss",
        "rollout/drift checkpoint.higher_is_better=false rollout.replay=runs/x",
        "rollout/on_policy_fraction checkpoint.higher_is_better=true",
        "train/entropy checkpoint.higher_is_better=true",
    ],
)
def test_checkpoints_rank_by_recorded_metrics(typed: str) -> None:
    assert problems_with(*f"checkpoint.metric={typed}".split()) == []


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("val/acuracy", "did you mean val/accuracy?"),
        ("train/kl_foward", "did you mean train/kl_forward?"),
        ("time/step_s", "time/step_s"),  # a checkpoint is written before the step's time is known
        ("val/teacher_accuracy", "val/teacher_accuracy"),
        ("nonsense", "docs/metrics.md"),
        ("train/entropy", "checkpoint.higher_is_better=null"),
        ("rollout/drift", "rollout.replay"),
        ("rollout/mean_turns", "rollout.environment"),
    ],
)
def test_what_cannot_rank_is_refused(metric: str, problem: str) -> None:
    (found,) = problems_with(f"checkpoint.metric={metric}")
    assert problem in found


@pytest.mark.parametrize(
    ("overrides", "keeps_highest"),
    [
        ([], True),
        (["checkpoint.metric=train/loss"], False),
        (["checkpoint.metric=val/aime24/accuracy"], True),
        (["checkpoint.metric=train/loss", "checkpoint.higher_is_better=true"], True),
    ],
)
def test_direction_is_the_metrics_own(overrides: list[str], keeps_highest: bool) -> None:
    (job,) = compose(overrides)
    assert job.config.checkpoint.keeps_highest == keeps_highest


def test_step_line_shows_declared_parts() -> None:
    metrics = {"train/lr": 0.1, "train/loss": 0.25, "rollout/accuracy": None, "val/accuracy": 0.5}
    assert step_line(3, 8, metrics) == "step 3/8 loss=0.2500 val=0.500"


def test_panel_rows_hold_declared_parts() -> None:
    screen = Screen("x", 10)
    screen.add(0, {"val/accuracy": 0.25, "val/teacher_accuracy": 0.9})
    screen.add(1, {"train/loss": 0.5, "val/accuracy": 0.5})
    assert screen.lines() == [
        ("now", "starting"),
        ("accuracy", "50.0% held out, 25.0% at the start, 90.0% the teacher"),
        ("loss", "0.5000  "),
    ]


def test_families_show_each_name() -> None:
    recorded = ["train/kl_forward", "teacher/a/kl_forward", "teacher/b.c+a/kl_forward", "teacher/a/token_share"]
    found = [(one.name, one.series) for metric in METRICS if metric.figure for one in metric.among(recorded)]
    assert ("teacher/b.c+a/kl_forward", "b.c+a") in found
    screen = Screen("a run", 3)
    screen.add(1, dict.fromkeys(recorded, 0.25))
    assert ("teachers", "a 0.2500, b.c+a 0.2500") in screen.lines()
    family = next(metric for metric in METRICS if metric.name == "teacher/<name>/kl_forward")
    assert family.figure
    spec = json.dumps(lines(family.figure, family.among(recorded)))
    assert "'teacher_b_c+a_kl_forward': 'b.c+a'" in spec
