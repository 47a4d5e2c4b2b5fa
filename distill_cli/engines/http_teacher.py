"""What teachers behind servers of either kind have in common: a thread that sends requests, in groups, to replicas."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from distill_cli.engines.base import OnEnd, Teacher, check_starts
from distill_cli.engines.replicas import Replicas
from distill_cli.engines.server_client import check_addresses
from distill_cli.engines.server_files import Find
from distill_cli.engines.server_info import Info, ServerKind
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.vllm_patches import Interrupted
from distill_cli.errors import DistillError
from distill_cli.types import Sample, TeacherScores

Result = TypeVar("Result")

ANSWER_BYTES = 2**25
"""Size of an answer, by which requests with a large top-k are smaller."""
IN_FLIGHT = 6
"""Requests that a server has at a time: its engine never waits for the next."""
POLL_S = 0.5
"""Seconds between two calls of `should_stop`."""


class HttpTeacher(Teacher):
    """Scores sequences on servers; one for each rank, which calls it alone.

    A thread sends the requests, so that `submit` works while the rank goes on. A request that fails is sent again, to
    another server if there is one, for `patience_s`.
    """

    num_ranks = 1
    kind: ClassVar[ServerKind[Any]]
    """The servers'."""
    request_tokens: ClassVar[int]
    """Tokens of a request. Smaller ones let answers be read while the rest is scored; larger ones are fewer batches."""
    sample_tokens: ClassVar[int]
    """The same of prompts with their longest answers."""
    default_probe_s: ClassVar[float] = 20.0

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        topk: int,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        patience_s: float = 600.0,
        probe_s: float | None = None,
        certificate: Path | str | None = None,
        client: str | None = None,
        should_stop: Callable[[], bool] | None = None,
        find: Find | None = None,
    ) -> None:
        """Connect to nothing yet. The token is in the environment (`ServerKind.token_names`).

        Args:
            addresses: http:// or https://, of servers with the same model; none with `find`.
            topk, temperature, vocab_size: see `VllmTeacher.score`.
            patience_s: seconds without any answer after which a call raises TeacherLost.
            probe_s: seconds without an answer after which a server is asked whether it still works, and without an
                answer to that after which it is left; None is `default_probe_s`.
            certificate: a PEM file with certificates to trust, such as a self-signed one; None are the system's.
            client: a name; clients of a server take turns. None is one of its own.
            should_stop: called while results are waited for; if it returns true, they are empty.
            find: finds servers that come and go, such as those of a job that is started again.

        Raises:
            ConfigError: an address is none, or the token would travel in the clear.
        """
        self._addresses = [] if find is not None else check_addresses(addresses, self.kind)
        self._topk, self._temperature, self._vocab_size = topk, temperature, vocab_size
        self._should_stop = should_stop
        self._loop = asyncio.new_event_loop()
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="served teacher", daemon=True)
        self._thread.start()
        arguments: dict[str, Any] = {"certificate": certificate, "client": client or uuid.uuid4().hex}
        arguments |= {
            "patience_s": patience_s,
            "probe_s": probe_s or self.default_probe_s,
            "in_flight": IN_FLIGHT,
            "find": find,
        }
        self._replicas: Replicas[Any] = self._run(_made(self._addresses, {"kind": self.kind, **arguments})).result()

    @abstractmethod
    async def _score(self, sequences: list[list[int]], response_starts: list[int], hidden: bool) -> list[TeacherScores]:
        """Return the scores of a group of sequences, by one request. Raises as `Replicas.post`."""

    @abstractmethod
    def _hidden_bytes(self) -> int:
        """Return the bytes of a hidden state. Raises ConfigError if the servers cannot return them."""

    @abstractmethod
    async def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingSettings
    ) -> list[Sample]:
        """Return the answers to a group of prompts. Raises as `Replicas.post`."""

    @property
    def comebacks(self) -> int:  # type: ignore[override]
        """How often a server answered again after it had failed."""
        return self._replicas.comebacks

    def wait_ready(self) -> None:
        """Block until a server can score.

        Raises:
            ConfigError: an address is not that of a server of this kind, or the token is wrong.
            TeacherLost: no server answered within `patience_s`.
        """
        self._now(self._replicas.wait_ready())

    def info(self) -> Info:
        """Return what the servers say of themselves. Raises as `wait_ready`."""
        return self._now(self._replicas.info())

    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        """Score on the servers; see `Teacher`. Raises TeacherLost, and DistillError for what a server refuses."""
        return self.submit(sequences, response_starts=response_starts, hidden=hidden)()

    def submit(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> Callable[[], list[TeacherScores]]:
        """Let the servers score meanwhile; see `Teacher`."""
        check_starts(sequences, response_starts)
        scored = [index for index, start in enumerate(response_starts) if start < len(sequences[index])]
        row_bytes = self._hidden_bytes() if hidden else 8 * self._topk + 4
        limit = min(self.request_tokens, max(ANSWER_BYTES // row_bytes, 1))
        groups = split_by_tokens([len(sequences[index]) for index in scored], limit)
        requests = [
            ([sequences[index] for index in scored[group]], [response_starts[index] for index in scored[group]], hidden)
            for group in groups
        ]
        future = self._run(self._all(self._score, requests))

        def wait() -> list[TeacherScores]:
            scores = [TeacherScores.empty(self._topk) for _ in sequences]
            with contextlib.suppress(Interrupted):
                parts = self._wait(future)
                for index, one in zip(scored, (one for part in parts for one in part), strict=True):
                    scores[index] = one
            return scores

        return wait

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        """Sample on the servers; see `VllmEngine.sample`. `on_end` is called when all have ended."""
        groups = split_by_tokens([len(prompt) + sampling.max_new_tokens for prompt in prompts], self.sample_tokens)
        requests = [(prompts[group], seeds[group], sampling) for group in groups]
        try:
            parts = self._wait(self._run(self._all(self._sample, requests)))
        except Interrupted:
            return [Sample([], [] if sampling.logp else None, "length") for _ in prompts]
        samples = [sample for part in parts for sample in part]
        for index, sample in enumerate(samples if on_end is not None else ()):
            assert on_end is not None
            on_end(index, sample)
        return samples

    def close(self) -> None:
        """Drop what is waited for, and end the thread; closing again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._replicas.close()
        self._loop.stop()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._loop.is_closed():
            work.close()
            raise DistillError("the served teacher is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _now(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return a result that a run needs to go on. Raises DistillError if it must stop first."""
        try:
            return self._wait(self._run(work))
        except Interrupted:
            who = " or ".join(self._addresses) or "a server of the teacher"
            raise DistillError(f"the run was stopped before {who} answered") from None

    def _wait(self, future: Future[Result]) -> Result:
        """Return a result. Raises Interrupted if the run must stop first."""
        while True:
            try:
                return future.result(timeout=POLL_S)
            except CancelledError:
                raise DistillError("the served teacher is closed") from None
            except TimeoutError:
                if self._should_stop is not None and self._should_stop():
                    future.cancel()
                    raise Interrupted from None

    async def _all(
        self, send: Callable[..., Coroutine[Any, Any, Result]], requests: Sequence[tuple[Any, ...]]
    ) -> list[Result]:
        """Return all results. When one request fails, drop the others and raise its error."""
        tasks = [asyncio.ensure_future(send(*request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


async def _made(addresses: Sequence[str], arguments: dict[str, Any]) -> Replicas[Any]:
    return Replicas(addresses, **arguments)


def split_by_tokens(lengths: Sequence[int], limit: int) -> list[slice]:
    """Return consecutive groups of at most `limit` tokens, or of one sequence."""
    groups, begin, tokens = list[slice](), 0, 0
    for index, length in enumerate(lengths):
        if index > begin and tokens + length > limit:
            groups.append(slice(begin, index))
            begin, tokens = index, 0
        tokens += length
    return [*groups, slice(begin, len(lengths))] if lengths else []
