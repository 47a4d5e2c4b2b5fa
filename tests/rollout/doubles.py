"""Doubles of engines that record their calls, and a source built from them."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial

import torch

from distill_cli.engines.base import Sampler, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.pack import Planner, plan_batch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.step_writer import StepWriter
from distill_cli.rollout.workers import Responder, RolloutWorker, ScoringWorker
from distill_cli.types import Example, Prompt, Sample, TeacherScores


class Recording:
    """Base of `RecordingSampler` and `RecordingTeacher`; a stop request may come during a call."""

    num_ranks = 1

    def __init__(self, name: str, calls: list[str], stop: StopFlag, *, stop_in: str = "") -> None:
        self.name, self.calls, self.stop, self.stop_in = name, calls, stop, stop_in

    def call(self, what: str) -> None:
        self.calls.append(what)
        if what == self.stop_in:
            ask_to_stop(self.stop)

    def wake(self) -> None:
        self.call(f"{self.name} wakes")

    def sleep(self) -> None:
        self.call(f"{self.name} sleeps")

    def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
        self.call(f"{self.name} samples {len(prompts)}")
        samples = [Sample([5, 6], [-1.0, -1.0] if sampling.logp else None, "stop") for _ in prompts]
        for index, sample in enumerate(samples if on_end is not None else ()):
            on_end(index, sample)
        return samples


class RecordingSampler(Recording, Sampler):
    version = -1

    def sleep(self) -> None:
        super().sleep()
        self.version = -1

    def sync(self, named_tensors, *, version: int) -> None:
        self.call(f"sync {version}")
        self.version = version

    def reset_prefix_cache(self) -> None:
        self.call("reset")


class RecordingTeacher(Recording, Teacher):
    def score(self, sequences, *, response_starts, hidden=False) -> list[TeacherScores]:
        self.call(f"{self.name} scores {len(sequences)}")
        ids, logp = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 4)
        return [TeacherScores.of_topk(ids, logp, torch.zeros(2)) for _ in sequences]


class Prompts:
    """The same prompts each step."""

    def __init__(self, number: int) -> None:
        self.prompts = [Prompt(i, [3, 4], Example("?", response="an answer")) for i in range(number)]

    def batch(self, step: int) -> list[Prompt]:
        return self.prompts


def ask_to_stop(stop: StopFlag) -> None:
    stop._on_signal(signal.SIGTERM, None)


def make_source(parallel: Parallel, calls: list[str], *, num_prompts: int = 2, stop_in: str = "") -> OnPolicy:
    """Build a source of global batches of two sequences whose engines append their calls to `calls`.

    Args:
        stop_in: the call during which the stop request comes.
    """
    stop = StopFlag()
    sampler, teacher = (
        kind(name, calls, stop, stop_in=stop_in)
        for kind, name in ((RecordingSampler, "sampler"), (RecordingTeacher, "teacher"))
    )
    stages = Stages(parallel, stop)
    planner = Planner(global_batch_size=2, rank=0, cut=partial(plan_batch, num_ranks=1, max_tokens=16))
    worker = RolloutWorker(
        sampler=sampler,
        weights=dict,
        version=lambda: 0,
        responder=Responder(SamplingSettings(max_new_tokens=4), seed=1, decode=str),
        stages=stages,
    )
    return OnPolicy(StepWriter(Prompts(num_prompts), 1, worker), ScoringWorker([teacher], planner, stages))


def writing(source: OnPolicy, **changes: object) -> OnPolicy:
    """Return the source with another `StepWriter`."""
    return replace(source, writer=replace(source.writer, **changes))
