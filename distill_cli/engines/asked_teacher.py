"""What teachers in other processes have in common: requests that are answered in their order."""

from __future__ import annotations

import threading
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from distill_cli.engines.base import OnEnd, Teacher
from distill_cli.engines.engine import reason
from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import ModelHead, Sample, TeacherScores


class CalledTeacher(Teacher):
    """Lets another process do what its methods do, by `_call`."""

    @abstractmethod
    def _call(self, method: str, **arguments: Any) -> Any:
        """Return what a method of the engine returns. Raises DistillError if it fails, or the process is gone."""

    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        return self._call("score", sequences=list(sequences), response_starts=list(response_starts), hidden=hidden)

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        return self._call("head", rows=rows)

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        """See `VllmEngine.sample`. `on_end` is called when all have ended."""
        samples = self._call("sample", prompts=list(prompts), seeds=list(seeds), sampling=sampling)
        if on_end is not None:
            for index, sample in enumerate(samples):
                on_end(index, sample)
        return samples


class AskedTeacher(CalledTeacher):
    """Sends each call to a process that answers it by `answer_of`. Several threads may call."""

    def __init__(self) -> None:
        self._requests = deque[Future[Any]]()
        self._sending, self._receiving = threading.Lock(), threading.Lock()

    @abstractmethod
    def _put(self, method: str, arguments: dict[str, Any]) -> None:
        """Send a request. Raises DistillError if the process is gone."""

    @abstractmethod
    def _take(self) -> Any:
        """Block until the next answer is there. Raises DistillError if the process is gone."""

    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        return self.submit(sequences, response_starts=response_starts, hidden=hidden)()

    def submit(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> Callable[[], list[TeacherScores]]:
        """Let the process score meanwhile; see `Teacher`."""
        self.wait_ready()
        starts = list(response_starts)
        request = self._send("score", sequences=list(sequences), response_starts=starts, hidden=hidden)
        return lambda: self._answer(request)

    def _call(self, method: str, **arguments: Any) -> Any:
        self.wait_ready()
        return self._answer(self._send(method, **arguments))

    def _send(self, method: str, **arguments: Any) -> Future[Any]:
        request = Future[Any]()
        with self._sending:
            self._put(method, arguments)
            self._requests.append(request)
        return request

    def _answer(self, request: Future[Any]) -> Any:
        """Return the answer to a request, or raise it if it is an error."""
        with self._receiving:
            while not request.done():
                answer = self._take()
                self._requests.popleft().set_result(answer)
        if isinstance(answer := request.result(), DistillError):
            raise answer
        return answer


def answer_of(call: Callable[[], Any]) -> Any:
    """Return what `call` returns, or the error that the asking process raises; print errors of its own."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, ConfigError):  # that is the user's, and says it all
            traceback.print_exc()
        return error if isinstance(error, DistillError) else DistillError(f"the teacher failed: {reason(error)}")
