"""The engines take turns with the trainer: who holds the device's memory when, told by doubles that write it down."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from distill_cli.config.schema import Config
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.train.rollout_worker import EnginePair
from distill_cli.train.run_state import StopRequested
from distill_cli.train.trainer import Trainer
from distill_cli.train.validation import Score
from distill_cli.types import Example, Prompt, Sample, TeacherScores


class RecordingEngine:
    tensor_parallel = 1

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.version = name, said, -1

    def wake(self) -> None:
        self.said.append(f"{self.name} wakes")

    def sleep(self) -> None:
        self.said.append(f"{self.name} sleeps")
        self.version = -1

    def sync(self, weights, *, version: int) -> None:
        self.said.append("sync")
        self.version = version

    def sample(self, prompts, *, seeds, sampling) -> list[Sample]:
        self.said.append("sample")
        return [Sample([5, 6], [-1.0, -1.0], "stop") for _ in prompts]

    def score(self, sequences, *, response_starts) -> list[TeacherScores]:
        self.said.append("score")
        ids, logp = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 4)
        return [TeacherScores(ids, logp, torch.zeros(2)) for _ in sequences]


class TrainingBegins(Exception):
    pass


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(Config().mesh, device=torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def trainer(parallel: Parallel, said: list[str], tmp_path: Path) -> Trainer:
    config = Config()
    config.rollout.generations_per_prompt, config.train.global_batch_size, config.loss.topk = 1, 2, 4

    def begin_training() -> None:
        said.append("train")
        raise TrainingBegins

    def validate(engine: RecordingEngine, *, as_teacher: bool) -> Score:
        assert as_teacher == (engine.name == "scorer")
        said.append(f"validate {engine.name}")
        return Score(1.0, 1.0, 0.0, 1)

    student = SimpleNamespace(lm=torch.nn.Linear(1, 1), one_class=())
    return Trainer(
        config=config,
        parallel=parallel,
        student=student,
        optimizer=None,
        schedule=SimpleNamespace(get_last_lr=begin_training),
        engines=EnginePair(
            config=config,
            parallel=parallel,
            student=student,
            sampler=RecordingEngine("sampler", said),
            scorer=RecordingEngine("scorer", said),
            sampling=None,
            verify=None,
            decode=str,
        ),
        prompts=SimpleNamespace(batch=lambda step: [Prompt(i, [3, 4], Example("?")) for i in range(2)]),
        validator=SimpleNamespace(run=validate),
        metrics_file=None,
        printer=SimpleNamespace(stage=lambda stage: None, step=lambda *args: None),
        num_steps=1,
        saver=None,
        rollouts_dir=tmp_path,
    )


def test_in_a_step_one_engine_is_awake_at_a_time_and_none_in_training(trainer: Trainer, said: list[str]) -> None:
    with pytest.raises(TrainingBegins):
        trainer.step(1)
    sampling = ["sampler wakes", "sync", "sample", "sampler sleeps"]
    assert said == [*sampling, "scorer wakes", "score", "scorer sleeps", "train"]


def test_a_validation_wakes_whom_it_asks_with_the_weights_of_its_step(trainer: Trainer, said: list[str]) -> None:
    trainer.measure_baseline()
    student = ["sampler wakes", "sync", "validate sampler", "sampler sleeps"]
    assert said == [*student, "scorer wakes", "validate scorer", "scorer sleeps"]


def test_a_stop_puts_engines_to_sleep(trainer: Trainer, said: list[str]) -> None:
    trainer.stop._on_signal(signal.SIGTERM, None)
    with pytest.raises(StopRequested):
        trainer.step(1)
    assert said == ["sampler wakes", "sync", "sampler sleeps"]
