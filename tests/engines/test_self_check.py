"""`distill check` is green where all is right, and names each defect that is planted."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_cli.checkpoint.saver import Saver, Trainable
from distill_cli.config.schema import Checkpointing, Config, Dtype, Precision
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.engines.settings import SamplingSettings
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.divergence import DistillLoss
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.ranks.check_rank import is_exact
from distill_cli.ranks.self_check import MASSES, Limits, SelfCheck
from distill_cli.student.load import load_weights
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule
from distill_cli.train.rollout_worker import EnginePair
from distill_cli.train.trainer import Trainer
from distill_cli.types import Example, Prompt

from .reference import random_sequences

SYNC = "the sampler has the new weights after a sync"
OTHER = "teacher != student: the loss is not zero"
SCORES = "scorer and trainer agree on the teacher"
OWN_SCORES = "scorer and trainer agree on the student"
ZERO = "teacher = student: the loss is zero"
MEAN = "the loss is the mean over all response tokens"


class Kept:
    """An engine that outlives the check, for the next test."""

    def __init__(self, engine: Sampler | Scorer) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


class NeverSynced(Kept):
    def sync(self, weights: object, *, version: int) -> None:
        self._engine.version = version


@pytest.fixture(scope="module")
def parallel(process_group) -> Parallel:
    return layout(Config().mesh, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def own_scorer(process_group, student, student_settings):
    scorer = Scorer(student_settings, topk=MASSES[-1])
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def teachers_scorer(process_group, teacher, teacher_settings):
    scorer = Scorer(teacher_settings, topk=MASSES[-1])
    yield scorer
    scorer.close()


def build_student(folder: str, parallel: Parallel, config: Config, *, temperature: float, factor: float) -> Student:
    exact = DistillLoss(kl_type="mixed")

    def loss(*args: torch.Tensor) -> torch.Tensor:
        return factor * exact(*args)

    made = Student(build_lm(Path(folder)), loss=loss, temperature=temperature, parallel=parallel)
    wrap(made, parallel, config.train)
    load_weights(made, made.lm, Path(folder), device=parallel.device)
    return made


@pytest.fixture
def wrong(
    parallel, sampler, student, own_scorer, teachers_scorer, student_settings, teacher_settings, tmp_path
) -> Callable[..., list[str]]:
    """What a check calls wrong, given what is planted."""

    def run(
        *, sampler: object = sampler, teacher: object = teachers_scorer, temperature: float = 1.0, factor: float = 1.0
    ) -> list[str]:
        config = Config()
        config.model.student.path, config.model.teacher.path = student_settings.path, teacher_settings.path
        config.model.student.dtype = config.model.teacher.dtype = Dtype.float32
        config.rollout.generations_per_prompt, config.train.global_batch_size, config.loss.topk = 1, 8, 16
        config.train.precision, config.train.activation_checkpointing = Precision.fp32, Checkpointing.none
        trained = build_student(student_settings.path, parallel, config, temperature=temperature, factor=factor)
        optimizer = build_optimizer(trained, config.train)
        schedule = build_schedule(optimizer, config.train, num_updates=10)
        trainable = Trainable(trained.lm, optimizer, schedule)
        folder = RunDir(tmp_path)
        folder.config.write_text("")
        prompts = [Prompt(i, ids, Example("?")) for i, ids in enumerate(random_sequences([5] * 8))]
        trainer = Trainer(
            config=config,
            parallel=parallel,
            student=trained,
            optimizer=optimizer,
            schedule=schedule,
            engines=EnginePair(
                config=config,
                parallel=parallel,
                student=trained,
                sampler=Kept(sampler),
                scorer=Kept(own_scorer),
                sampling=SamplingSettings(max_new_tokens=24),
                verify=None,
                decode=str,
            ),
            prompts=SimpleNamespace(batch=lambda step: prompts),
            validator=None,
            metrics_file=None,
            printer=SimpleNamespace(stage=lambda stage: None),
            num_steps=10,
            saver=Saver(folder, config.checkpoint, trainable),
            rollouts_dir=tmp_path,
        )
        check = SelfCheck(
            trainer=trainer,
            trainable=trainable,
            loss=DistillLoss(kl_type="mixed"),
            make_teacher=lambda: Kept(teacher),
            load_teacher=lambda: build_student(
                teacher_settings.path, parallel, config, temperature=temperature, factor=1.0
            ),
            checkpoints=folder.checkpoints,
            limits=Limits.of(exact=True),
            report=lambda finding: None,
        )
        is_good = check.run()
        found = [finding.what for finding in check.findings if finding.is_good is False]
        assert is_good == (not found)
        assert len(check.findings) == (10 if OTHER in found else 11)  # no slope where there is no loss
        return found

    yield run
    sampler.sync(student.named_parameters(), version=0)


def test_nothing_is_wrong_where_all_is_right(wrong) -> None:
    assert wrong() == []


def test_a_sync_that_is_left_out(wrong, sampler) -> None:
    assert wrong(sampler=NeverSynced(sampler)) == [SYNC]


def test_a_teacher_that_is_the_student(wrong, own_scorer) -> None:
    assert wrong(teacher=own_scorer) == [OTHER, SCORES]


def test_a_temperature_on_one_side_only(wrong) -> None:
    assert wrong(temperature=2.0) == [OWN_SCORES, ZERO, SCORES]


def test_a_loss_scaled_by_the_number_of_ranks(wrong) -> None:
    assert wrong(factor=2.0) == [MEAN]


def test_limits_are_those_of_float32_where_all_of_it_is() -> None:
    config = Config()
    config.train.precision = Precision.fp32
    config.model.student.dtype = config.model.teacher.dtype = Dtype.float32
    assert is_exact(config, torch.device("cpu"))
    assert not is_exact(config, torch.device("cuda"))
    config.model.teacher.dtype = Dtype.bfloat16
    assert not is_exact(config, torch.device("cpu"))
