"""`distill check` is green where all is right, and names each defect that is planted."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_cli.checkpoint.saver import Saver, Trainable
from distill_cli.config.loss_schema import LossConfig
from distill_cli.config.schema import (
    Checkpointing,
    Config,
    Dtype,
    ModelConfig,
    Precision,
    StudentModel,
    TeacherModel,
    TrainConfig,
)
from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.ranks.self_check import EXACT, MASSES, ROUNDED, SelfCheck
from distill_cli.rollout.pack import Planner, plan_batch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import Responder, RolloutWorker, ScoringWorker
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.student.weights import load_weights, synced_parameters
from distill_cli.types import Example, ModelHead, Prompt

from .reference import VOCAB_SIZE, random_sequences

pytestmark = pytest.mark.slow

SYNC = "the sampler has the new weights after a sync"
OTHER = "teacher != student: the loss is not zero"
SCORES = "scorer and trainer agree on the teacher"
HEAD = "its hidden states and head give its scores"
OWN_SCORES = "scorer and trainer agree on the student"
ZERO = "teacher = student: the loss is zero"
MEAN = "the loss is the mean over all response tokens"


class Kept:
    """An engine that outlives the check, for the next test."""

    def __init__(self, engine: AnsweringEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


class NeverSynced(Kept):
    def sync(self, weights: object, *, version: int) -> None:
        self._engine.version = version


class RowsOneLater(Kept):
    """Its head has each token's row one place too late."""

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        whole = self._engine.head()
        return replace(whole, weight=whole.weight.roll(1, 0)).part(rows)


@pytest.fixture(scope="module")
def parallel(process_group) -> Parallel:
    return layout(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def own_scorer(process_group, student, student_settings):
    scorer = VllmTeacher(student_settings, topk=MASSES[-1])
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def teachers_scorer(process_group, teacher, teacher_settings):
    scorer = VllmTeacher(teacher_settings, topk=MASSES[-1])
    yield scorer
    scorer.close()


def build_student(folder: str, parallel: Parallel, *, temperature: float, factor: float) -> Student:
    exact = DistillLoss(kl_type="mixed")

    def loss(*args: torch.Tensor) -> torch.Tensor:
        return factor * exact(*args)

    lm, published = build_lm(Path(folder))
    made = Student(lm, objective=Objective(loss, temperature), parallel=parallel, published=published)
    wrap(made, parallel, bf16=False)
    load_weights(made.lm, published, device=parallel.device)
    return made


def of(student: str, teacher: str) -> Config:
    """A config of these two folders, all of it in float32."""
    models = ModelConfig(
        StudentModel(path=student, dtype=Dtype.float32), TeacherModel(path=teacher, dtype=Dtype.float32)
    )
    train = TrainConfig(precision=Precision.fp32, activation_checkpointing=Checkpointing.none)
    return Config(model=models, train=train, loss=LossConfig(topk=16))


@pytest.fixture
def wrong(
    parallel, sampler, student, own_scorer, teachers_scorer, student_settings, teacher_settings, tmp_path
) -> Callable[..., list[str]]:
    """What a check calls wrong, given what is planted."""

    def run(
        *,
        sampler: object = sampler,
        teacher: object = teachers_scorer,
        temperature: float = 1.0,
        factor: float = 1.0,
        with_head: bool = False,
    ) -> list[str]:
        config = of(student_settings.path, teacher_settings.path)
        trained = build_student(student_settings.path, parallel, temperature=temperature, factor=factor)
        optimizer = build_optimizer(trained, lr=2e-5)
        schedule = build_schedule(optimizer, num_updates=10)
        trainable = Trainable(trained.lm, optimizer, schedule)
        folder = RunDir(tmp_path)
        folder.config.write_text("")
        stages = Stages(parallel, StopFlag())
        planner = Planner(global_batch_size=8, rank=0, cut=partial(plan_batch, num_ranks=1, max_tokens=16384))
        check = SelfCheck(
            config=config,
            parallel=parallel,
            prompts=[Prompt(i, ids, Example("?")) for i, ids in enumerate(random_sequences([5] * 8))],
            worker=RolloutWorker(
                sampler=Kept(sampler),
                weights=partial(synced_parameters, trained.lm, trained.published, as_adapter=False),
                version=lambda: 0,
                responder=Responder(SamplingSettings(max_new_tokens=24), seed=config.train.seed, decode=str),
                stages=stages,
            ),
            own_scoring=ScoringWorker([Kept(own_scorer)], planner, stages),
            make_scoring=lambda: ScoringWorker([Kept(teacher)], planner, stages),
            student=trained,
            trainable=trainable,
            load_teacher=lambda: build_student(teacher_settings.path, parallel, temperature=temperature, factor=1.0),
            saver=Saver(folder, trainable),
            checkpoints=folder.checkpoints,
            vocab_size=VOCAB_SIZE,
            heads=TeacherHeads(parallel, VOCAB_SIZE, VOCAB_SIZE) if with_head else None,
        )
        findings = list(check.run())
        found = [finding.what for finding in findings if finding.is_good is False]
        assert len(findings) == (14 if OTHER in found else 15) + with_head  # no slope where there is no loss
        return found

    yield run
    sampler.sync(student.named_parameters(), version=0)


def test_no_defect_no_finding(wrong) -> None:
    assert wrong() == []


def test_a_sync_that_is_left_out(wrong, sampler) -> None:
    assert wrong(sampler=NeverSynced(sampler)) == [SYNC]


def test_a_teacher_that_is_the_student(wrong, own_scorer) -> None:
    assert wrong(teacher=own_scorer) == [OTHER, SCORES]


def test_a_temperature_on_one_side_only(wrong) -> None:
    assert wrong(temperature=2.0) == [OWN_SCORES, ZERO, SCORES]


def test_a_head_that_is_not_the_scores(wrong, teachers_scorer) -> None:
    assert wrong(with_head=True) == []
    assert wrong(with_head=True, teacher=RowsOneLater(teachers_scorer)) == [HEAD]


def test_loss_scaled_by_ranks(wrong) -> None:
    assert wrong(factor=2.0) == [MEAN]


def test_exact_needs_float32_throughout() -> None:
    config = of("student", "teacher")
    low = replace(config.model, teacher=TeacherModel(path="teacher", dtype=Dtype.bfloat16))
    for made, device, limits in (
        (config, "cpu", EXACT),
        (config, "cuda", ROUNDED),
        (replace(config, model=low), "cpu", ROUNDED),
    ):
        check = SimpleNamespace(config=made, parallel=SimpleNamespace(device=torch.device(device)))
        assert SelfCheck.limits.fget(check) is limits
