"""The HTTP side of a teacher behind servers of either kind: which gets a request, and when it is sent again.

Everything here runs in one event loop. A server that fails rests for a while, longer each time, and must identify
itself before it gets work again: it may have come back with another model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx

from distill_cli.engines.server_files import Find
from distill_cli.engines.server_info import KINDS, ServerKind, SomeInfo
from distill_cli.engines.wire import CLIENT_HEADER, TOKEN, BadBody
from distill_cli.errors import ConfigError, DistillError, TeacherLost, Unrecoverable

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

CONNECT_S = 10.0
FIRST_REST_S, MOST_REST_S = 0.25, 5.0
"""How long a server rests after its first failure in a row, and at most; the time doubles with each."""
MOST_ENGINE_FAILURES = 3
"""How often an engine may fail at a request before that is given up: it would fail again."""
LOOK_S = 2.0
"""Seconds between two looks for servers that write where they are."""
MOST_SHOWN = 120
"""Characters that messages show of an answer."""
KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), 30) for name in ("TCP_KEEPIDLE",) if hasattr(socket, name)),
]
"""A connection whose other machine is gone is noticed although nothing is sent on it."""


class Retry(Exception):
    """A request failed and may succeed later or elsewhere; the message says what was seen."""

    def __init__(self, seen: str, *, status: int = 0, after_s: float = 0.0, is_loading: bool = False) -> None:
        super().__init__(seen)
        self.status, self.after_s, self.is_loading = status, after_s, is_loading


class OtherKind(ConfigError):
    """Something answers at an address, and it is no server of the kind that was expected."""


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


def check_addresses(addresses: Sequence[str], kind: ServerKind[Any]) -> list[str]:
    """Return the addresses without a slash at the end. Raises ConfigError with all that cannot be used."""
    problems = [problem for address in addresses if (problem := _address_problem(address, kind))]
    if problems or not addresses:
        raise ConfigError(*problems or [f"no address of a {kind.shown} is given"])
    return [address.rstrip("/") for address in addresses]


def _address_problem(address: str, kind: ServerKind[Any]) -> str | None:
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return f"{address}: not the address of a server; give one such as http://127.0.0.1:8008"
    if parts.scheme not in ("http", "https") or not host:
        return f"{address}: must begin with http:// or https://; give one such as http://127.0.0.1:8008"
    if parts.username or parts.password or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{host}"
        return f"{shown}: has more than scheme, host, port and path; the token is {TOKEN} in the environment"
    is_local = host == "localhost" or host.startswith("127.") or host == "::1"
    if kind.token and parts.scheme == "http" and not is_local:
        names = " or ".join(kind.token_names)
        return f"{address}: the token of {names} would travel in the clear; use https:// ({kind.tls_flag})"
    return None


class Replicas(Generic[SomeInfo]):
    """All servers of one model."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        kind: ServerKind[SomeInfo],
        certificate: Path | None,
        client: str,
        patience_s: float,
        probe_s: float,
        in_flight: int,
        find: Find | None = None,
    ) -> None:
        """Connect to nothing yet; see `HttpTeacher` for the arguments. Call it in the event loop."""
        self.kind, self._replicas = kind, [Replica(address) for address in addresses]
        self._find, self._looks_at, self._trusted = find, 0.0, set[str]()
        self._patience_s, self._probe_s, self._in_flight = patience_s, probe_s, in_flight
        self._identity: SomeInfo | None = None
        self.comebacks = 0
        """How often a server was known again after a failure."""
        self._last_success = time.monotonic()
        self._changed = asyncio.Condition()
        # Not httpx's own: it would import certifi's authorities, and read a proxy's address from the environment.
        try:
            context = ssl.create_default_context(cafile=certificate)
            if find is not None:  # trusts the servers that are found, and nobody else
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        except OSError as error:  # the base of ssl's errors
            raise ConfigError(f"{certificate}: cannot be read as a certificate ({error}); give one in PEM") from error
        self._context = context
        transport = httpx.AsyncHTTPTransport(
            verify=context,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60),
            socket_options=KEEP_ALIVE,
        )
        headers = {CLIENT_HEADER: client, "accept-encoding": "identity"}
        if kind.token:
            headers["authorization"] = f"Bearer {kind.token}"
        timeout = httpx.Timeout(probe_s, connect=min(CONNECT_S, probe_s), pool=None)
        self._http = httpx.AsyncClient(transport=transport, headers=headers, timeout=timeout)

    async def close(self) -> None:
        await self._http.aclose()

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
        headers = {"content-type": content_type} if content_type else {}
        while True:
            replica = await self._acquire(begin, in_flight=in_flight or self._in_flight)
            replica.num_requests += 1
            replica.tokens += tokens
            try:
                await self._check_identity(replica)
                answer = await self._watched(replica, self._post(replica, route, body, headers, parse))
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
                content = (await self._get(replica, route))[1]
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
            await self._get(replica, "/health")
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
            if certificate not in self._trusted:
                self._context.load_verify_locations(cadata=certificate)
                self._trusted.add(certificate)
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

    # requests to one server

    async def _check_identity(self, replica: Replica) -> None:
        """Read the info of a server that is new, or failed.

        Raises:
            ConfigError: it is no server of this kind, or not of the others' model.
            Unrecoverable: it has another model than before.
        """
        async with replica.identity_lock:
            if replica.is_known:
                return
            response, content = await self._get(replica, self.kind.info_route)
            try:
                info = self.kind.parse_info(content)
            except ValueError as error:
                self._reject(replica, response, str(error))
            if self._identity is None:
                self._identity = info
            elif info.identity != self._identity.identity:
                what = f"{replica.address} serves {info.name}, and the scores so far are those of {self._identity.name}"
                raise Unrecoverable(f"{what}; start it with the same model")
            self.comebacks += replica.was_known
            replica.is_known = replica.was_known = True
        await self._notify()  # it takes more than one request now

    def _reject(self, replica: Replica, response: httpx.Response, why: str) -> None:
        """Raise OtherKind for an answer that no server of this kind gives; Retry if the address had one before."""
        kind = response.headers.get("content-type", "no type")
        answered = f"it answered {response.status_code}, {kind}: {response.text[:MOST_SHOWN]!r}"
        if self._identity is not None:
            raise Retry(f"{why}, {answered}")
        fix = f"give the address of {' or '.join(f'`{one.command}`' for one in KINDS)}"
        raise OtherKind(f"{replica.address}: {why}, {answered}; {fix}")

    async def _get(self, replica: Replica, route: str) -> tuple[httpx.Response, Any]:
        """Return an answer and its JSON, None if it is none. Raises Retry, DistillError."""
        try:
            response = await self._http.get(replica.address + route)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{replica.address}: not the address of a server ({error})") from error
        except httpx.HTTPError as error:
            is_wrong = "CERTIFICATE_VERIFY_FAILED" in str(error)
            if is_wrong and self._identity is None and self._find is None:
                fix = "give the file of the server's certificate"
                raise ConfigError(f"{replica.address}: its certificate is not trusted ({error}); {fix}") from error
            raise Retry(_describe(error)) from error
        content = None
        with contextlib.suppress(ValueError):
            content = json.loads(response.content)
        self._check_status(replica, route, response.status_code, response.headers, content, response)
        return response, content

    async def _post(
        self,
        replica: Replica,
        route: str,
        body: bytes,
        headers: dict[str, str],
        parse: Callable[[bytearray], Answer],
    ) -> Answer:
        answer = bytearray()  # tensors that are made of it may be written to
        timeout = httpx.Timeout(None, connect=min(CONNECT_S, self._probe_s), write=60.0)  # `_watched` ends it
        request: dict[str, Any] = {"content": body, "headers": headers, "timeout": timeout}
        try:
            async with self._http.stream("POST", replica.address + route, **request) as response:
                async for chunk in response.aiter_raw():
                    answer += chunk
        except httpx.HTTPError as error:
            raise Retry(_describe(error)) from error
        content = None
        if response.status_code != 200:
            with contextlib.suppress(ValueError):
                content = json.loads(bytes(answer))
        self._check_status(replica, route, response.status_code, response.headers, content, None)
        try:
            return parse(answer)
        except BadBody as error:
            raise Retry(f"an answer that does not match the request ({error})") from error

    def _check_status(
        self,
        replica: Replica,
        route: str,
        status: int,
        headers: httpx.Headers,
        content: Any,
        response: httpx.Response | None,
    ) -> None:
        """Raise Retry for a failure that may pass, DistillError for a refusal; return for an answer."""
        if status == 200:
            return
        sentence = _reason(content)
        if status in (401, 403):
            what = f"{replica.address} refuses the token" + (f" ({sentence})" if sentence else "")
            raise ConfigError(f"{what}; set {' or '.join(self.kind.token_names)} to the token of the server")
        if status >= 500 or status in (408, 429):
            seen = f"status {status}" + (f", {sentence}" if sentence else "")
            is_loading = isinstance(content, dict) and content.get("state") == "loading"
            raise Retry(seen, status=status, after_s=_seconds(headers.get("retry-after")), is_loading=is_loading)
        if response is not None and (sentence is None or route == self.kind.info_route):
            self._reject(replica, response, f"not a {self.kind.shown}")
        raise DistillError(f"{replica.address} refused a request ({status}): {sentence or 'without a reason'}")

    async def _watched(self, replica: Replica, request: Any) -> Any:
        """Return a request's answer, however long it takes while the server answers probes. Raises Retry if not."""
        task = asyncio.ensure_future(request)
        try:
            while not (await asyncio.wait([task], timeout=self._probe_s))[0]:
                try:
                    await self._http.get(replica.address + "/health")
                except httpx.HTTPError as error:
                    raise Retry(f"no answer to a request, and to a probe {_describe(error)}") from error
            return task.result()
        finally:
            task.cancel()


def _reason(content: Any) -> str | None:
    """Return the reason in the JSON of a failure: the text `error`, or the message in it, as OpenAI's API has it."""
    error = content.get("error") if isinstance(content, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return text if isinstance(text, str) else None


def _describe(error: httpx.HTTPError) -> str:
    """Return what was seen, in a few words."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0
