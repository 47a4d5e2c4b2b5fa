"""A teacher whose engines are on ranks of their own (`cluster.roles=split`): both sides of it.

Each rank that trains sends its requests to one engine, which answers them in their order; a thread for each rank sends
the answers, so that the engine goes on while the rank trains.
"""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.engines.base import OnEnd, Teacher
from distill_cli.engines.engine import reason
from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import ConfigError, DistillError
from distill_cli.parallel.roles import Link
from distill_cli.types import ModelHead, Sample, TeacherScores

POLL_S, CLOSING_POLL_S = 0.005, 0.5


class RankTeacher(Teacher):
    """The teacher, as a rank that trains calls it."""

    num_ranks = 1
    works_apart = True

    def __init__(self, link: Link) -> None:
        self._link = link
        self._requests = deque[Future[Any]]()
        self._sending, self._receiving = threading.Lock(), threading.Lock()

    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        return self.submit(sequences, response_starts=response_starts, hidden=hidden)()

    def submit(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> Callable[[], list[TeacherScores]]:
        """Let the engine score meanwhile; see `Teacher`."""
        starts = list(response_starts)
        request = self._send("score", sequences=list(sequences), response_starts=starts, hidden=hidden)
        return lambda: self._answer(request)

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        head: ModelHead = self._answer(self._send("head", rows=rows))
        return head

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        """Return one answer to each prompt; `on_end` is called when all have ended."""
        request = self._send("sample", prompts=list(prompts), seeds=list(seeds), sampling=sampling)
        samples: list[Sample] = self._answer(request)
        for index, sample in enumerate(samples if on_end is not None else ()):
            assert on_end is not None
            on_end(index, sample)
        return samples

    def _send(self, method: str, **arguments: Any) -> Future[Any]:
        request = Future[Any]()
        with self._sending:
            self._link.requests.put((method, arguments))
            self._requests.append(request)
        return request

    def _answer(self, request: Future[Any]) -> Any:
        with self._receiving:
            while not request.done():  # answers come in the order of the requests
                ((_, content),) = self._link.replies.receive()
                self._requests.popleft().set_result(pickle.loads(content.numpy().tobytes()))
        if isinstance(answer := request.result(), DistillError):
            raise answer
        return answer


def serve_ranks(teacher: Teacher, links: Sequence[Link], *, is_closing: Callable[[], bool]) -> None:
    """Answer the requests of ranks that train, on all ranks of an engine, until they end it. A collective of these.

    Args:
        links: on the engine's first rank, to each rank that it scores for.
    """
    group = dist.new_subgroups(teacher.num_ranks)[0] if teacher.num_ranks < dist.get_world_size() else None
    first = dist.get_rank() // teacher.num_ranks * teacher.num_ranks
    senders = [ThreadPoolExecutor(1) for _ in links]

    def next_request() -> tuple[int, Any] | None:
        looked = 0.0
        while True:
            for index, link in enumerate(links):
                if link.requests.has_next():
                    return index, link.requests.take()
            if time.monotonic() > looked + CLOSING_POLL_S:
                if is_closing():
                    return None
                looked = time.monotonic()
            time.sleep(POLL_S)

    while True:
        box = [next_request() if dist.get_rank() == first else None]
        if teacher.num_ranks > 1:
            dist.broadcast_object_list(box, src=first, group=group)
        if box[0] is None:
            return
        index, (method, arguments) = box[0]
        answer: Any = None
        try:
            answer = getattr(teacher, method)(**arguments)
        except Exception as error:
            if not isinstance(error, ConfigError):  # that is the user's, and says it all
                traceback.print_exc()
            is_known = isinstance(error, DistillError)
            answer = error if is_known else DistillError(f"the teacher failed: {reason(error)}")
        if links:
            senders[index].submit(_reply, links[index], answer)


def _reply(link: Link, answer: Any) -> None:
    content = torch.frombuffer(bytearray(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)
    link.replies.send([("answer", content)])
