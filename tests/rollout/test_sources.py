"""Sources of scored batches: when engines are awake, writers of sequences, stops within a step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.length_guard import LengthGuard
from distill_cli.rollout.off_policy import dataset_samples, teacher_samples
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.stages import StopRequested
from tests.rollout.doubles import make_source, writing

AWAKE = ["sampler wakes", "sync 0", "sampler samples 2", "sampler sleeps"]
SCORED = ["teacher wakes", "teacher scores 2", "teacher sleeps"]


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(device=torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def make(parallel: Parallel, calls: list[str]) -> Callable[..., OnPolicy]:
    return partial(make_source, parallel, calls)


def test_engines_are_awake_in_turn(make, calls: list[str]) -> None:
    batch = make().step(1)
    assert calls == [*AWAKE, *SCORED]
    assert batch.is_current
    assert list(batch.scores) == [place for plan in batch.plans for place in plan.members] == [0, 1]


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
def test_answers_may_be_scored_as_they_end(make, calls: list[str], fraction: float) -> None:
    """Those of the student; others when it has finished. Each in its place."""
    source = writing(
        make(num_prompts=4),
        on_policy_fraction=fraction,
        write_others=partial(dataset_samples, encode=lambda text: [7]),
    )
    late = source.step(1)
    source = replace(source, scoring=replace(source.scoring, begins_early=True))
    calls.clear()
    batch = source.step(1)
    assert (batch.rollouts, batch.plans) == (late.rollouts, late.plans)
    assert batch.scores.keys() == late.scores.keys() == {0, 1, 2, 3}
    number = round(4 * fraction)
    parts = [f"teacher scores {one}" for one in (4 - number, number) if one]
    assert [call for call in calls if call.startswith("teacher scores")] == parts


def test_stages_are_timed(make) -> None:
    source = make()
    source.step(1)
    stages = source.writer.worker.stages
    assert stages.lap().keys() == {f"time/{stage}_s" for stage in ("wake", "sync", "sample", "score")}
    assert stages.lap() == {}


@pytest.mark.parametrize(
    ("stop_in", "last"),
    [
        ("sync 0", "sampler sleeps"),
        ("sampler samples 2", "sampler sleeps"),
        ("teacher scores 2", "teacher sleeps"),
    ],
)
def test_a_stop_puts_engines_to_sleep(make, calls: list[str], stop_in: str, last: str) -> None:
    with pytest.raises(StopRequested, match="SIGTERM"):
        make(stop_in=stop_in).step(1)
    assert calls[-2:] == [stop_in, last]


def test_what_was_interrupted_is_not_recorded(make) -> None:
    written = []
    recorder = type("Written", (), {"write": lambda self, step, batch: written.append(step)})()
    replace(make(), recorder=recorder).step(1)
    with pytest.raises(StopRequested):
        replace(make(stop_in="teacher scores 2"), recorder=recorder).step(2)
    assert written == [1]


def mixture(student: OnPolicy, write_others: Callable, *, fraction: float = 0.5) -> OnPolicy:
    return writing(student, on_policy_fraction=fraction, write_others=write_others)


def test_the_teacher_writes_its_share(make, calls: list[str]) -> None:
    student = make(num_prompts=4)
    write = partial(teacher_samples, scoring=student.scoring, sampling=student.writer.worker.responder.sampling)
    batch = mixture(student, write).step(1)
    others = ["teacher wakes", "teacher samples 2", "teacher sleeps"]
    assert calls == [*AWAKE, *others, "teacher wakes", "teacher scores 4", "teacher sleeps"]
    assert sorted(rollout.sample.source for rollout in batch.rollouts) == ["student"] * 2 + ["teacher"] * 2
    assert all((one.sample.logp is None) == (one.sample.source == "teacher") for one in batch.rollouts)
    assert [one.prompt.index for one in batch.rollouts] == [0, 1, 2, 3]


def test_the_dataset_writes_all(make, calls: list[str]) -> None:
    student = make(num_prompts=2)
    write = partial(dataset_samples, encode=lambda text: [len(text), 2])
    batch = mixture(student, write, fraction=0.0).step(1)
    assert "sampler samples 0" in calls
    assert [one.sample.token_ids for one in batch.rollouts] == [[9, 2], [9, 2]]
    assert {one.sample.source for one in batch.rollouts} == {"dataset"}


def test_an_empty_share_wakes_no_engine(make, calls: list[str]) -> None:
    batch = mixture(make(), lambda prompts, seeds: pytest.fail("called"), fraction=0.9).step(1)
    assert calls == [*AWAKE, *SCORED]
    assert {one.sample.source for one in batch.rollouts} == {"student"}


def test_guard_gives_answers_to_the_teacher(make, calls: list[str]) -> None:
    student = make(num_prompts=8)
    write = partial(teacher_samples, scoring=student.scoring, sampling=student.writer.worker.responder.sampling)
    guard = LengthGuard(above=0.3, most=0.5, steps=2, write=write)
    source = writing(mixture(student, partial(dataset_samples, encode=lambda text: [7])), guard=guard)

    def sources(step: int) -> tuple[list[str], float]:
        batch = source.step(step)
        written = [rollout.sample.source for rollout in batch.rollouts]
        return [written.count(one) for one in ("student", "teacher", "dataset")], batch.metrics["rollout/guard_share"]

    assert sources(1) == ([4, 0, 4], 0)
    assert not any(call.startswith("teacher samples") for call in calls)
    guard.observe(0.4)
    assert sources(2) == ([2, 2, 4], 0.25)
    guard.observe(0.2)
    assert sources(3) == ([3, 1, 4], 0.125)
    guard.observe(0.2)
    assert sources(4) == ([4, 0, 4], 0)
