"""A teacher whose engines are on ranks of their own (`cluster.roles=split`): both sides of it.

Each rank that trains sends its requests to one engine, which answers them in their order; a thread for each rank sends
the answers, so that the engine goes on while the rank trains.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.engines.asked_teacher import AskedTeacher, answer_of
from distill_cli.engines.base import Teacher
from distill_cli.parallel.roles import Link

POLL_S, CLOSING_POLL_S = 0.005, 0.5


class RankTeacher(AskedTeacher):
    """The teacher, as a rank that trains calls it."""

    num_ranks = 1
    works_apart = True

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def _put(self, method: str, arguments: dict[str, Any]) -> None:
        self._link.requests.put((method, arguments))

    def _take(self) -> Any:
        ((_, content),) = self._link.replies.receive()
        return pickle.loads(content.numpy().tobytes())


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
        answer = answer_of(partial(getattr(teacher, method), **arguments))
        if links:
            senders[index].submit(_reply, links[index], answer)


def _reply(link: Link, answer: Any) -> None:
    content = torch.frombuffer(bytearray(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)
    link.replies.send([("answer", content)])
