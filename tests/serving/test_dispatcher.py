"""Batches go to engines and come back to those who wait, whatever happens to an engine or a client."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy
import pytest

from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import SampleRequest, ScoreRequest
from distill_cli.errors import DistillError
from distill_cli.serving.dispatcher import PROBE, Budget, Dispatcher, ServerStops, Waiting
from distill_cli.serving.fair_queue import FairQueue
from distill_cli.serving.server_metrics import ServerMetrics


class Engine:
    """Answers with the lengths of a request's sequences, when it is let; fails at those of 7 tokens."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[list[int]]]] = []
        self.may_answer = asyncio.Event()
        self.is_broken = False

    async def call(self, method: str, *, requests: Sequence[Any]) -> list[dict[str, numpy.ndarray]]:
        if requests[0] is not PROBE:
            self.batches.append((method, [request.lengths.tolist() for request in requests]))
        await self.may_answer.wait()
        if self.is_broken or any(7 in request.lengths for request in requests):
            raise DistillError("out of memory")
        return [{"lengths": request.lengths} for request in requests]


def scored(*lengths: int, **options: Any) -> ScoreRequest:
    sequences = [[1] * length for length in lengths]
    return ScoreRequest.of(sequences, [1] * len(lengths), **{"topk": 1, "temperature": 1.0, **options})


def run(test: Callable[[Dispatcher, Engine], Awaitable[None]], *, max_tokens: int = 1000) -> None:
    async def main() -> None:
        engine = Engine()
        budget = Budget(score=10, sample=100)
        dispatcher = Dispatcher(FairQueue(max_tokens=max_tokens), budget, ServerMetrics())
        dispatcher.feed([engine])  # type: ignore[list-item]
        await test(dispatcher, engine)
        await dispatcher.stop(within_s=0.0)

    asyncio.run(asyncio.wait_for(main(), 20))


def submit(dispatcher: Dispatcher, request: Any, client: str = "a") -> Waiting:
    return dispatcher.submit(request, client=client, max_model_len=64)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_parts_come_back_in_order() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        work = submit(dispatcher, scored(6, 5, 4, 9, 1))
        engine.may_answer.set()
        assert [one["lengths"].tolist() for one in await work.done] == [[6], [5, 4], [9, 1]]
        assert dispatcher.is_idle

    run(check)


def test_an_engine_has_two_batches() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        for _ in range(4):
            submit(dispatcher, scored(10))
        await settle()
        assert len(engine.batches) == 2
        assert dispatcher.queue.num_tokens == 20

    run(check)


def test_requests_that_differ_are_apart() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        engine.may_answer.set()
        sampled = SampleRequest.of([[1]], [1], sampling=SamplingSettings(max_new_tokens=3))
        requests = [scored(1), scored(1, topk=2), scored(1, temperature=2.0), scored(1, vocab_size=5), sampled]
        works = [submit(dispatcher, request, str(place)) for place, request in enumerate(requests)]
        await asyncio.gather(*(work.done for work in works))
        score, sample = "score_batch", "sample_batch"
        assert engine.batches == [(score, [[1], [1]]), (score, [[1]]), (score, [[1]]), (sample, [[1]])]

    run(check)


def test_cancelled_work_reaches_no_engine() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        works = [submit(dispatcher, scored(10, 10, 10)) for _ in range(3)]
        await settle()
        dispatcher.cancel(works[0])
        dispatcher.cancel(works[2])
        engine.may_answer.set()
        assert len(await works[1].done) == 3
        assert len(engine.batches) == 5  # the two that had begun, and three
        assert dispatcher.is_idle

    run(check)


def test_a_failure_is_its_requests_own() -> None:
    """What shares a batch with a request that cannot be answered is answered nevertheless."""

    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        first = [submit(dispatcher, scored(10), "first") for _ in range(2)]
        await settle()
        bad, good = submit(dispatcher, scored(7), "bad"), submit(dispatcher, scored(3), "good")
        engine.may_answer.set()
        with pytest.raises(DistillError, match="out of memory"):
            await bad.done
        assert [len(await work.done) for work in (*first, good)] == [1, 1, 1]
        assert ("score_batch", [[7], [3]]) in engine.batches
        await settle()
        assert dispatcher.is_idle
        assert not dispatcher.failure.done()

    run(check)


def test_a_broken_engine_ends_the_server() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        engine.is_broken = True
        work = submit(dispatcher, scored(10))
        engine.may_answer.set()
        assert "out of memory" in str(await dispatcher.failure)
        with pytest.raises(DistillError):
            await work.done

    run(check)


def test_stopping_finishes_what_waits() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        works = [submit(dispatcher, scored(10)) for _ in range(5)]
        engine.may_answer.set()
        await dispatcher.stop(within_s=10.0)
        assert all(work.done.result() for work in works)

    run(check)


def test_stopping_late_fails_what_waits() -> None:
    async def check(dispatcher: Dispatcher, engine: Engine) -> None:
        works = [submit(dispatcher, scored(10)) for _ in range(5)]
        await settle()
        await dispatcher.stop(within_s=0.05)
        for work in works:
            with pytest.raises(ServerStops):
                await work.done

    run(check)
