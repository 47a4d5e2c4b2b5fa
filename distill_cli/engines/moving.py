"""A teacher that is the student, as it is now or as it was: it scores with the sampler's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from distill_cli.engines.base import OnEnd, Teacher
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.scoring import Scoring
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.engines.weight_sync import Outgoing
from distill_cli.types import ModelHead, Sample, TeacherScores


class ScoringSampler(VllmSampler, Scoring):
    """The student's engine, which also scores."""

    def __init__(self, settings: EngineSettings, *, topk: int, should_stop: Callable[[], bool] | None = None) -> None:
        """Load the student; the arguments are `VllmSampler`'s and `VllmTeacher`'s."""
        super().__init__(settings, should_stop=should_stop, **self.engine_arguments(settings, topk=topk))
        self.prepare_scoring(topk=topk)


class MovingTeacher(Teacher):
    """Scores with weights of the student that are brought to the sampler's engine when it wakes.

    It needs no engine and no memory of its own on the device. The sampler gets the student's weights back by the next
    `sync` of its own.
    """

    def __init__(
        self,
        engine: ScoringSampler,
        *,
        temperature: float,
        weights: Callable[[], Iterable[Outgoing]],
        version: Callable[[], int],
        in_place: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            temperature: `loss.temperature`.
            weights: returns the weights of the model as `sync` takes them.
            version: returns the version of the teacher's weights: the student's where they are the same.
            in_place: returns a context in which the model has the teacher's weights.
        """
        self.num_ranks, self._engine, self._temperature = engine.num_ranks, engine, temperature
        self._weights, self._version, self._in_place = weights, version, in_place

    def wake(self) -> None:
        """Wake the engine with the teacher's weights. A collective."""
        self._engine.wake()
        version = self._version()
        if self._engine.version != version:
            with self._in_place():
                self._engine.sync(self._weights(), version=version)

    def sleep(self) -> None:
        self._engine.sleep()

    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        return self._engine.score(
            sequences, response_starts=response_starts, temperature=self._temperature, hidden=hidden
        )

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        return self._engine.head(rows)

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        return self._engine.sample(prompts, seeds=seeds, sampling=sampling, on_end=on_end)
