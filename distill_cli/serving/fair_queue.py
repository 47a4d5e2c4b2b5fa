"""The work that waits for an engine. Clients take turns, so that none waits for all the work of another.

A batch has requests of one group, which the engine can answer together. The client that waits longest decides which,
and each next sequence is of the client with the fewest tokens in the batch. A request may be spread over several
batches. Order depends on the order of arrival alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

REMEMBERED_S = 10.0
"""How long room is kept for a client that found the queue full."""


class QueueFull(Exception):
    """The tokens of a request do not fit; it may be sent again later."""


@dataclass(eq=False)
class Work:
    """A request that waits, or of which some sequences do."""

    client: str
    group: Hashable
    """Works of one group can be in one batch."""
    costs: Sequence[int]
    """Tokens of each sequence."""
    request: Any = None
    next: int = 0
    """The first sequence that no batch has taken."""

    @property
    def waiting_tokens(self) -> int:
        return sum(self.costs[self.next :])


@dataclass
class Part:
    """Consecutive sequences of a request that are in a batch."""

    work: Work
    begin: int
    end: int


@dataclass
class _Client:
    works: deque[Work] = field(default_factory=deque)
    tokens: int = 0


class FairQueue:
    """Waiting work by client, in the order in which the clients' turns come."""

    def __init__(self, *, max_tokens: int) -> None:
        """`max_tokens` may wait at a time."""
        self._max_tokens = max_tokens
        self._clients: dict[str, _Client] = {}  # the next in turn first
        self._refused: dict[str, float] = {}
        self.num_tokens = 0

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def push(self, work: Work, *, now: float) -> None:
        """Append a request to its client's work.

        Raises:
            QueueFull: its tokens do not fit; or its client has its share of the queue, and another one, which lately
                found the queue full, has not.
        """
        tokens, own = work.waiting_tokens, self._clients.get(work.client)
        self._refused = {name: end for name, end in self._refused.items() if end > now}
        share = self._max_tokens // len(self._clients.keys() | self._refused.keys() | {work.client})
        is_greedy = own is not None and own.tokens + tokens > share and any(map(self._waits, self._refused))
        if is_greedy or self.num_tokens + tokens > self._max_tokens:
            self._refused[work.client] = now + REMEMBERED_S
            raise QueueFull
        self._refused.pop(work.client, None)
        client = self._clients.setdefault(work.client, _Client())
        client.works.append(work)
        client.tokens += tokens
        self.num_tokens += tokens

    def _waits(self, name: str) -> bool:
        return name not in self._clients

    def remove(self, work: Work) -> None:
        """Drop what no batch has taken of a request; does nothing if there is nothing left of it."""
        client = self._clients.get(work.client)
        if client is not None and work in client.works:
            client.works.remove(work)
            self._took(work.client, work.waiting_tokens)
            work.next = len(work.costs)

    def take(self, budget_of: Callable[[Hashable], int]) -> list[Part]:
        """Return the next batch; nothing if nothing waits.

        Args:
            budget_of: the most tokens of a batch of a group; a batch has at least one sequence.
        """
        if not self._clients:
            return []
        parts: dict[Work, Part] = {}
        in_batch, total = dict.fromkeys(self._clients, 0), 0
        group = self._head(next(iter(self._clients))).group
        budget = budget_of(group)
        while True:
            fitting = [name for name in in_batch if name in self._clients and self._head(name).group == group]
            if not fitting:
                break
            name = min(fitting, key=in_batch.__getitem__)  # of equal ones the first in turn
            work = self._head(name)
            cost = work.costs[work.next]
            if parts and total + cost > budget:
                break
            parts.setdefault(work, Part(work, work.next, work.next)).end += 1
            in_batch[name], total = in_batch[name] + cost, total + cost
            self._advance(name, work, cost)
        for name in [name for name, tokens in in_batch.items() if tokens and name in self._clients]:
            self._clients[name] = self._clients.pop(name)  # the others' turns come first now
        return list(parts.values())

    def _head(self, name: str) -> Work:
        return self._clients[name].works[0]

    def _advance(self, name: str, work: Work, cost: int) -> None:
        work.next += 1
        if work.next == len(work.costs):
            self._clients[name].works.popleft()
        self._took(name, cost)

    def _took(self, name: str, tokens: int) -> None:
        self.num_tokens -= tokens
        self._clients[name].tokens -= tokens
        if not self._clients[name].works:
            del self._clients[name]
