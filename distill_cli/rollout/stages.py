"""The stages of a step: timed, each engine awake only in its own, and the run ended between two of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from distill_cli.engines.base import AnsweringEngine
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel


class StopRequested(Exception):
    """The run ends after the last step that is done; all ranks raise it together."""


class Stages:
    """What stands around the stages of a step, so that the step itself reads as its stages.

    Every rank enters the same stages and makes the same stop checks in the same order.

    For example:
        with stages.awake(sampler), stages("sample"):
            ...
        stages.check_stop()
    """

    def __init__(
        self, parallel: Parallel, stop: StopFlag, *, on_stage: Callable[[str], object] = lambda stage: None
    ) -> None:
        """`on_stage` is called with the name of each stage as it begins."""
        self.parallel, self._stop, self._on_stage = parallel, stop, on_stage
        self.seconds: dict[str, float] = defaultdict(float)
        """By stage, since the last `lap`."""
        self.longest_s = 0.0
        """The longest step so far, with its validation: what another one may take."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens within as `stage`."""
        self._on_stage(stage)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    @contextmanager
    def awake(self, engine: AnsweringEngine) -> Iterator[None]:
        """Keep `engine` awake within; waking and putting to sleep are the stage `wake`."""
        with ExitStack() as turn:
            with self("wake"):
                turn.enter_context(engine.awake())
            try:
                yield
            finally:
                with self("wake"):
                    turn.close()

    def check_stop(self, *, within_s: float = 0.0) -> None:
        """Raise StopRequested on all ranks if any was asked to stop, or must have in `within_s`. A collective."""
        if self.parallel.all_max(float(self._stop.is_set(within_s=within_s))):
            raise StopRequested(self._stop.reason)

    def lap(self) -> dict[str, float]:
        """Return `time/<stage>_s` since the last lap."""
        metrics = {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
        self.seconds.clear()
        return metrics
