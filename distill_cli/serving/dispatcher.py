"""Give waiting requests to the engines in batches, and deliver the answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import Arrays, SampleRequest, ScoreRequest
from distill_cli.errors import DistillError
from distill_cli.serving.engine_processes import Engine
from distill_cli.serving.fair_queue import FairQueue, Part, Work
from distill_cli.serving.request_checks import costs
from distill_cli.serving.server_metrics import ServerMetrics

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches that an engine has at a time: one that it computes, and one that it takes up without a pause."""
PROBE = ScoreRequest.of([[0, 0]], [1], topk=1, temperature=1.0)
"""What an engine that failed must be able to score: one whose device is broken is not, and ends the server."""


@dataclass(frozen=True)
class Group:
    """What must be the same in all requests of a batch."""

    method: str
    """Name of the `BatchTeacher` method that answers the batch."""
    vocab_size: int | None
    temperature: float | None = None
    sampling: SamplingSettings | None = None
    is_hidden: bool = False
    """Hidden states are asked for, not a top-k."""
    number: int | None = None
    """Number of the request if it must be alone in its batch; None if requests may share one."""


class ServerStops(Exception):
    """A request is not answered any more."""


@dataclass(frozen=True)
class Budget:
    """Tokens of a batch."""

    score: int
    sample: int

    def __call__(self, group: Hashable) -> int:
        assert isinstance(group, Group)
        return self.score if group.method == "score_batch" else self.sample


@dataclass(eq=False)
class Waiting(Work):
    """A request, and what is there of its answer."""

    done: asyncio.Future[list[Arrays]] = field(default_factory=asyncio.Future)
    answers: dict[int, Arrays] = field(default_factory=dict)
    """By the first sequence of each part."""
    num_answered: int = 0


class Dispatcher:
    """The queue of a server, and the tasks that feed its engines."""

    def __init__(
        self, queue: FairQueue, budget: Budget, metrics: ServerMetrics, *, fixed_batches: bool = False
    ) -> None:
        """`fixed_batches` puts no two requests into a batch: what else waits then changes no bit of an answer."""
        self.queue = queue
        self._numbers = itertools.count() if fixed_batches else itertools.repeat(None)
        self._budget, self._metrics = budget, metrics
        self._has_work = asyncio.Event()
        self._engines: Sequence[Engine] = ()
        self._feeders: list[asyncio.Task[None]] = []
        self._open: set[Waiting] = set()
        self._num_running = 0
        self._busy_s = self._busy_tokens = 0.0
        self.failure = asyncio.get_running_loop().create_future()
        """Gets the DistillError of an engine that is broken."""

    def feed(self, engines: Sequence[Engine]) -> None:
        """Begin to give batches to these engines."""
        self._engines = engines
        for engine in engines:
            self._feeders += [asyncio.create_task(self._feed(engine)) for _ in range(BATCHES_AHEAD)]
        for feeder in self._feeders:
            feeder.add_done_callback(self._feeder_ended)

    def _feeder_ended(self, feeder: asyncio.Task[None]) -> None:
        """End the server if a feeder fails, which is a defect: what waits would wait for ever."""
        if not feeder.cancelled() and (error := feeder.exception()) is not None and not self.failure.done():
            log.error("the server failed", exc_info=error)
            self.failure.set_result(DistillError(f"the server failed: {error!r}"))

    def submit(self, request: ScoreRequest | SampleRequest, *, client: str, max_model_len: int) -> Waiting:
        """Queue a request, whose `done` gets the answers to its parts, in order. Raises QueueFull."""
        number = next(self._numbers)
        if isinstance(request, ScoreRequest):
            temperature, is_hidden = request.temperature, request.topk == 0
            group = Group("score_batch", request.vocab_size, temperature, is_hidden=is_hidden, number=number)
        else:
            group = Group("sample_batch", request.vocab_size, sampling=request.sampling, number=number)
        work = Waiting(client, group, costs(request, max_model_len), request)
        self.queue.push(work, now=time.monotonic())
        self._open.add(work)
        work.done.add_done_callback(lambda _: self._open.discard(work))
        self._has_work.set()
        return work

    async def ask(self, method: str, **arguments: Any) -> Any:
        """Return the answer of an engine to a question apart from the queue. Raises DistillError."""
        return await self._engines[0].call(method, **arguments)

    def cancel(self, work: Waiting) -> None:
        """Drop a request that nobody waits for; an engine finishes the batch that it has."""
        self.queue.remove(work)
        work.done.cancel()

    @property
    def is_idle(self) -> bool:
        return self.queue.num_tokens == 0 and self._num_running == 0

    def retry_after(self) -> int:
        """Return the seconds after which some room should be in the queue, 1 to 30."""
        rate = self._busy_tokens / self._busy_s if self._busy_s else math.inf
        return min(30, max(1, math.ceil(self.queue.num_tokens / 4 / rate)))

    async def stop(self, *, within_s: float) -> None:
        """Wait until nothing waits or runs, at most so long; then stop feeding the engines, and fail what is left."""
        deadline = time.monotonic() + within_s
        while not self.is_idle and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for feeder in self._feeders:
            feeder.cancel()
        for work in [*self._open]:
            self.queue.remove(work)
            if not work.done.done():
                work.done.set_exception(ServerStops())

    async def _feed(self, engine: Engine) -> None:
        while True:
            while not (parts := self.queue.take(self._budget)):
                self._has_work.clear()
                await self._has_work.wait()
            self._num_running += 1
            try:
                await self._run(engine, parts)
            except DistillError as error:
                await self._recover(engine, parts, error)
            finally:
                self._num_running -= 1

    async def _recover(self, engine: Engine, parts: Sequence[Part], error: DistillError) -> None:
        """Answer the requests of a failed batch one by one, and fail those that fail alone.

        One that no engine can answer, such as one that takes too much memory, must not fail those of other clients.
        """
        log.error("a batch of %d requests failed: %s", len(parts), error)
        for part in parts:
            try:
                if len(parts) == 1:
                    raise error
                await self._run(engine, [part])
            except DistillError as own:
                self._fail(part.work, own)
        try:
            await engine.call("score_batch", requests=[PROBE])
        except DistillError as broken:
            if not self.failure.done():
                self.failure.set_result(broken)

    async def _run(self, engine: Engine, parts: Sequence[Part]) -> None:
        """Let an engine answer a batch. Raises DistillError."""
        group = parts[0].work.group
        assert isinstance(group, Group)
        num_tokens = sum(sum(part.work.costs[part.begin : part.end]) for part in parts)
        begin = time.monotonic()
        answers = await engine.call(group.method, requests=[_request_of(part) for part in parts])
        seconds = time.monotonic() - begin
        self._busy_s, self._busy_tokens = self._busy_s + seconds, self._busy_tokens + num_tokens
        self._metrics.batch(group.method.partition("_")[0], seconds=seconds, num_tokens=num_tokens)
        for part, answer in zip(parts, answers, strict=True):
            self._deliver(part, answer)

    def _deliver(self, part: Part, answer: Arrays) -> None:
        work = part.work
        assert isinstance(work, Waiting)
        work.answers[part.begin] = answer
        work.num_answered += part.end - part.begin
        if work.num_answered == len(work.costs) and not work.done.done():
            work.done.set_result([work.answers[begin] for begin in sorted(work.answers)])

    def _fail(self, work: Work, error: DistillError) -> None:
        assert isinstance(work, Waiting)
        self.queue.remove(work)
        if not work.done.done():
            work.done.set_exception(error)


def _request_of(part: Part) -> ScoreRequest | SampleRequest:
    is_whole = part.begin == 0 and part.end == len(part.work.costs)
    request: ScoreRequest | SampleRequest = part.work.request
    return request if is_whole else request.part(part.begin, part.end)
