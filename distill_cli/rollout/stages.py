"""Time the stages of a step, keep an engine awake only during its stage, and stop the run between stages."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from distill_cli.engines.base import AnsweringEngine
from distill_cli.errors import TeacherLost
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel


class StopRequested(Exception):
    """The run ends after its last completed step; all ranks raise it together."""

    def __init__(self, reason: str, *, is_failure: bool = False) -> None:
        super().__init__(reason)
        self.is_failure = is_failure


class Stages:
    """Context managers around the stages of a step.

    Every rank enters the same stages and makes the same stop checks in the same order:

        with stages.awake(sampler), stages("sample"):
            ...
        stages.check_stop()
    """

    def __init__(self, parallel: Parallel, stop: StopFlag) -> None:
        self.parallel, self._stop = parallel, stop
        self.on_stage: Callable[[str], object] = lambda stage: None
        """Called with the name of each stage when it begins."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds by stage since the last `lap`."""
        self.longest_s = 0.0
        """Seconds of the longest step so far, validation included: an estimate for the next."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as `stage`."""
        self.on_stage(stage)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    @contextmanager
    def awake(self, engine: AnsweringEngine) -> Iterator[None]:
        """Keep `engine` awake in the block; waking it and putting it to sleep are the stage `wake`."""
        with ExitStack() as stack:
            with self("wake"):
                stack.enter_context(engine.awake())
            try:
                yield
            finally:
                with self("wake"):
                    stack.close()

    def check_stop(self, *, within_s: float = 0.0) -> None:
        """Raise StopRequested on all ranks if one received a stop request or is due to in `within_s`. A collective."""
        mine = self._stop.is_set(within_s=within_s)
        if self.parallel.all_max(float(mine)):
            everyone: list[tuple[bool, str] | None] = [None] * self.parallel.size
            dist.all_gather_object(everyone, (self._stop.is_failure, self._stop.reason) if mine else None)
            is_failure, reason = max(one for one in everyone if one is not None)
            raise StopRequested(reason, is_failure=is_failure)

    @contextmanager
    def unless_lost(self) -> Iterator[None]:
        """Let the next `check_stop` stop the run on all ranks if a teacher is lost in the block, which then ends."""
        try:
            yield
        except TeacherLost as error:
            self._stop.fail(str(error))

    def lap(self) -> dict[str, float]:
        """Return `time/<stage>_s` since the last lap, and begin another."""
        metrics = {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
        self.seconds.clear()
        return metrics
