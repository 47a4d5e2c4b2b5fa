"""The servers of a teacher, of either kind: which gets a request, and when it is sent again.

Everything here runs in one event loop. A server that fails rests for a while, longer each time, and must identify
itself before it gets work again: it may have come back with another model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from distill_cli.engines.server_client import Retry, ServerClient, Unexpected
from distill_cli.engines.server_files import Find
from distill_cli.engines.server_info import ServerKind, SomeInfo
from distill_cli.errors import DistillError, TeacherLost, Unrecoverable

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_REST_S, MOST_REST_S = 0.25, 5.0
"""How long a server rests after its first failure in a row, and at most; the time doubles with each."""
MOST_ENGINE_FAILURES = 3
"""How often an engine may fail at a request before that is given up: it would fail again."""
LOOK_S = 2.0
"""Seconds between two looks for servers that write where they are."""


@dataclass(eq=False)
class Replica:
    """One server."""

    address: str
    num_requests: int = 0
    """Those that it has now."""
    tokens: int = 0
    """Their tokens."""
    num_failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    is_known: bool = False
    """Its info has been read since its last failure."""
    was_known: bool = False
    """Its info has been read at some time."""
    seen: str = ""
    """The last failure since it has answered."""
    identity_lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Replicas(Generic[SomeInfo]):
    """All servers of one model."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        kind: ServerKind[SomeInfo],
        certificate: Path | str | None,
        client: str,
        patience_s: float,
        probe_s: float,
        in_flight: int,
        find: Find | None = None,
    ) -> None:
        """Connect to nothing yet; see `HttpTeacher` for the arguments. Call it in the event loop."""
        self.kind, self._replicas = kind, [Replica(address) for address in addresses]
        self._find, self._looks_at = find, 0.0
        self._patience_s, self._probe_s, self._in_flight = patience_s, probe_s, in_flight
        self._identity: SomeInfo | None = None
        self.comebacks = 0
        """How often a server was known again after a failure."""
        self._last_success = time.monotonic()
        self._changed = asyncio.Condition()
        self._client = ServerClient(
            kind, certificate=certificate, client=client, probe_s=probe_s, trusts_system=find is None
        )

    async def close(self) -> None:
        await self._client.close()

    @property
    def addresses(self) -> list[str]:
        return [replica.address for replica in self._replicas]

    # one request, wherever it is answered

    async def post(
        self,
        route: str,
        body: bytes,
        *,
        tokens: int,
        parse: Callable[[bytearray], Answer],
        content_type: str | None = None,
        in_flight: int | None = None,
    ) -> Answer:
        """Return the parsed answer to a body, from whichever server gives one.

        Args:
            tokens: those in the request, by which servers are balanced.
            in_flight: requests that a server may have when it is given this one; None is as at the start.
            parse: raises BadBody for an answer that does not match the request, which is sent again.

        Raises:
            TeacherLost: none answered within `patience_s` of the last answer.
            Unrecoverable: a server has another model than before.
            DistillError: a server refused the request.
        """
        begin, num_engine_failures = time.monotonic(), 0
        while True:
            replica = await self._acquire(begin, in_flight=in_flight or self._in_flight)
            replica.num_requests += 1
            replica.tokens += tokens
            try:
                await self._check_identity(replica)
                answer = await self._client.post(replica.address, route, body, parse=parse, content_type=content_type)
            except Retry as failure:
                num_engine_failures += failure.status == 500
                if num_engine_failures == MOST_ENGINE_FAILURES:
                    raise DistillError(f"{replica.address} failed at a request again and again: {failure}") from None
                self._failed(replica, failure)
            else:
                self._succeeded(replica)
                return answer
            finally:
                replica.num_requests -= 1
                replica.tokens -= tokens
                await self._notify()

    async def get(self, route: str) -> Any:
        """Return the JSON of a route, from whichever server gives it. Raises as `post`."""
        begin = time.monotonic()
        while True:
            replica = await self._acquire(begin, in_flight=self._in_flight)
            try:
                await self._check_identity(replica)
                content = await self._expected(self._client.get(replica.address, route))
            except Retry as failure:
                self._failed(replica, failure)
            else:
                self._succeeded(replica)
                return content

    async def info(self) -> SomeInfo:
        """Return the description of the servers, read once. Raises as `post`."""
        if self._identity is None:
            await self.get(self.kind.info_route)
        assert self._identity is not None
        return self._identity

    async def wait_ready(self) -> None:
        """Return when a server can score. Raises as `post`; one that loads its model is waited for in any case."""
        begin = time.monotonic()
        while True:
            self._look()
            found = await asyncio.gather(*(self._is_ready(replica) for replica in self._replicas))
            if any(found):
                return
            now = time.monotonic()
            self._check_patience(begin, now)
            ends = [replica.rests_until for replica in self._replicas] or [now + LOOK_S]
            await asyncio.sleep(max(0.05, min(ends) - now))

    async def _is_ready(self, replica: Replica) -> bool:
        if replica.rests_until > time.monotonic():
            return False
        try:
            await self._check_identity(replica)
            await self._expected(self._client.get(replica.address, "/health"))
        except Retry as failure:
            self._failed(replica, failure)
            return False
        self._succeeded(replica)
        return True

    # choosing

    def _look(self) -> None:
        """Take up the servers that have appeared, and drop those that are gone and have no requests."""
        if self._find is None or (now := time.monotonic()) < self._looks_at:
            return
        self._looks_at = now + LOOK_S
        found = {server.address: server.certificate for server in self._find()}
        self._replicas = [one for one in self._replicas if one.address in found or one.num_requests]
        known = {replica.address for replica in self._replicas}
        for address, certificate in found.items():
            self._client.trust(certificate)
            if address not in known:
                log.info("%s serves the teacher", address)
                # One that appears later is compared as one that has come back.
                self._replicas.append(Replica(address, was_known=self._identity is not None))

    async def _acquire(self, begin: float, *, in_flight: int) -> Replica:
        """Return the server with the fewest tokens, when one has room. Raises TeacherLost."""
        async with self._changed:
            while True:
                self._look()
                now = time.monotonic()
                self._check_patience(begin, now)
                rested = [replica for replica in self._replicas if replica.rests_until <= now]
                # One that has failed gets a single request until it has answered.
                free = [one for one in rested if one.num_requests < (in_flight if one.is_known else 1)]
                if free:
                    return min(free, key=lambda one: one.tokens)
                ends = [replica.rests_until - now for replica in self._replicas if replica not in rested]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.01, min([1.0, *ends]))):
                        await self._changed.wait()

    def _check_patience(self, begin: float, now: float) -> None:
        waited = now - max(begin, self._last_success)
        has_failed = any(replica.num_failures for replica in self._replicas) or not self._replicas
        if waited <= self._patience_s or not has_failed:
            return
        if any(not one.num_failures and one.num_requests for one in self._replicas):
            return  # a server has work, and answers the probes
        seen = "; ".join(f"{replica.address}: {replica.seen}" for replica in self._replicas if replica.seen)
        fix = f"start the server again ({self.kind.command}), then resume the run"
        if self._find is not None:
            fix = "see the output of the teacher's job in the run's folder"
        raise TeacherLost(f"no {self.kind.shown} answered for {waited:.0f} s ({seen or 'none is there'}); {fix}")

    def _failed(self, replica: Replica, failure: Retry) -> None:
        now = time.monotonic()
        if replica.rests_until <= now:  # else another of its requests has failed at the same time
            rest = min(MOST_REST_S, FIRST_REST_S * 2**replica.num_failures) * random.uniform(0.5, 1.0)
            replica.num_failures += 1
            replica.rests_until = now + rest
        replica.rests_until = max(replica.rests_until, now + failure.after_s)
        if not replica.seen:
            level = logging.INFO if failure.is_loading else logging.WARNING
            log.log(level, "%s: %s; its requests are sent again", replica.address, failure)
        replica.is_known, replica.seen = False, str(failure)
        if failure.is_loading:  # it is not away, however long that takes
            self._last_success, replica.num_failures = time.monotonic(), 1

    def _succeeded(self, replica: Replica) -> None:
        if replica.seen:
            log.info("%s answers again", replica.address)
            replica.seen = ""
        self._last_success = time.monotonic()
        replica.num_failures, replica.rests_until = 0, 0.0

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # who answers

    async def _check_identity(self, replica: Replica) -> None:
        """Read the info of a server that is new, or failed.

        Raises:
            ConfigError: it is no server of this kind.
            Unrecoverable: it has another model than before.
        """
        async with replica.identity_lock:
            if replica.is_known:
                return
            info = await self._expected(self._client.info(replica.address))
            if self._identity is None:
                self._identity = info
            elif info.identity != self._identity.identity:
                what = f"{replica.address} serves {info.name}, and the scores so far are those of {self._identity.name}"
                raise Unrecoverable(f"{what}; start it with the same model")
            self.comebacks += replica.was_known
            replica.is_known = replica.was_known = True
        await self._notify()  # it takes more than one request now

    async def _expected(self, answer: Coroutine[Any, Any, Answer]) -> Answer:
        """Return an answer. Something else that answers is a failure that may pass where a server has been, or moves.

        Raises:
            Unexpected: it is the first answer from an address that a user gave.
            Retry: the server failed.
        """
        try:
            return await answer
        except Unexpected as error:
            if self._identity is None and self._find is None:
                raise
            raise Retry(error.seen) from error
