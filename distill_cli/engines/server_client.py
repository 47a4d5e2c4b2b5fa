"""Requests to one server of a teacher, of either kind, and what its answers mean."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx

from distill_cli.engines.server_info import KINDS, ServerKind, SomeInfo
from distill_cli.engines.wire import CLIENT_HEADER, TOKEN, BadBody
from distill_cli.errors import ConfigError, DistillError

Answer = TypeVar("Answer")

CONNECT_S = 10.0
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


class Unexpected(ConfigError):
    """Something answers at an address, and it is not the server that was expected; `seen` is its answer."""

    def __init__(self, address: str, seen: str, fix: str) -> None:
        super().__init__(f"{address}: {seen}; {fix}")
        self.seen = seen


class OtherKind(Unexpected):
    """It is no server of the kind that was expected."""


class Untrusted(Unexpected):
    """It has a certificate that is not trusted."""


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


class ServerClient(Generic[SomeInfo]):
    """Sends requests to servers of one kind, each to the address that it is given."""

    def __init__(
        self,
        kind: ServerKind[SomeInfo],
        *,
        certificate: Path | str | None,
        client: str,
        probe_s: float,
        trusts_system: bool,
    ) -> None:
        """Connect to nothing yet; see `HttpTeacher` for the arguments.

        Args:
            trusts_system: trust the system's certificates, or those in `certificate`; else only those of `trust`.

        Raises:
            ConfigError: `certificate` cannot be read.
        """
        self._kind, self._probe_s = kind, probe_s
        # Not httpx's own: it would import certifi's authorities, and read a proxy's address from the environment.
        try:
            system = ssl.create_default_context
            self._context = system(cafile=certificate) if trusts_system else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        except OSError as error:  # the base of ssl's errors
            raise ConfigError(f"{certificate}: cannot be read as a certificate ({error}); give one in PEM") from error
        self._trusted = set[str]()
        transport = httpx.AsyncHTTPTransport(
            verify=self._context,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60),
            socket_options=KEEP_ALIVE,
        )
        headers = {CLIENT_HEADER: client, "accept-encoding": "identity"}
        if kind.token:
            headers["authorization"] = f"Bearer {kind.token}"
        timeout = httpx.Timeout(probe_s, connect=min(CONNECT_S, probe_s), pool=None)
        self._http = httpx.AsyncClient(transport=transport, headers=headers, timeout=timeout)

    def trust(self, certificate: str) -> None:
        """Trust a certificate (PEM) too, from now on."""
        if certificate not in self._trusted:
            self._context.load_verify_locations(cadata=certificate)
            self._trusted.add(certificate)

    async def close(self) -> None:
        await self._http.aclose()

    async def info(self, address: str) -> SomeInfo:
        """Return what a server says of itself. Raises as `get`."""
        response, content = await self._get(address, self._kind.info_route)
        try:
            return self._kind.parse_info(content)
        except ValueError as error:
            raise self._other_kind(address, response, str(error)) from error

    async def get(self, address: str, route: str) -> Any:
        """Return the JSON of a route, None if the answer is none.

        Raises:
            Retry: no answer, or a failure that may pass.
            Unexpected: something else answers.
            ConfigError: the token is refused, or the address is none.
            DistillError: the server refuses the request.
        """
        return (await self._get(address, route))[1]

    async def _get(self, address: str, route: str) -> tuple[httpx.Response, Any]:
        try:
            response = await self._http.get(address + route)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{address}: not the address of a server ({error})") from error
        except httpx.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                seen, fix = f"its certificate is not trusted ({error})", "give the file of the server's certificate"
                raise Untrusted(address, seen, fix) from error
            raise Retry(_describe(error)) from error
        content = _json(response.content)
        if self._is_other_kind(route, response.status_code, content):
            raise self._other_kind(address, response, f"not a {self._kind.shown}")
        self._check_status(address, response.status_code, response.headers, content)
        return response, content

    def _is_other_kind(self, route: str, status: int, content: Any) -> bool:
        """Whether no server of this kind refuses a request in this way."""
        is_refusal = 200 < status < 500 and status not in (401, 403, 408, 429)
        return is_refusal and (_reason(content) is None or route == self._kind.info_route)

    def _other_kind(self, address: str, response: httpx.Response, why: str) -> OtherKind:
        content_type = response.headers.get("content-type", "no type")
        seen = f"{why}, it answered {response.status_code}, {content_type}: {response.text[:MOST_SHOWN]!r}"
        commands = " or ".join(f"`{one.command}`" for one in KINDS)
        return OtherKind(address, seen, f"give the address of {commands}")

    async def post(
        self,
        address: str,
        route: str,
        body: bytes,
        *,
        parse: Callable[[bytearray], Answer],
        content_type: str | None = None,
    ) -> Answer:
        """Return the parsed answer to a body, however long it takes while the server answers probes.

        Args:
            parse: raises BadBody for an answer that does not match the request.

        Raises:
            Retry, ConfigError, DistillError: as `get`.
        """
        return await self._watched(address, self._post(address, route, body, parse, content_type))

    async def _post(
        self, address: str, route: str, body: bytes, parse: Callable[[bytearray], Answer], content_type: str | None
    ) -> Answer:
        answer = bytearray()  # tensors that are made of it may be written to
        timeout = httpx.Timeout(None, connect=min(CONNECT_S, self._probe_s), write=60.0)  # `_watched` ends it
        headers = {"content-type": content_type} if content_type else {}
        request: dict[str, Any] = {"content": body, "headers": headers, "timeout": timeout}
        try:
            async with self._http.stream("POST", address + route, **request) as response:
                async for chunk in response.aiter_raw():
                    answer += chunk
        except httpx.HTTPError as error:
            raise Retry(_describe(error)) from error
        if response.status_code != 200:
            self._check_status(address, response.status_code, response.headers, _json(bytes(answer)))
        try:
            return parse(answer)
        except BadBody as error:
            raise Retry(f"an answer that does not match the request ({error})") from error

    async def _watched(self, address: str, request: Coroutine[Any, Any, Answer]) -> Answer:
        task = asyncio.ensure_future(request)
        try:
            while not (await asyncio.wait([task], timeout=self._probe_s))[0]:
                try:
                    await self._http.get(address + "/health")
                except httpx.HTTPError as error:
                    raise Retry(f"no answer to a request, and to a probe {_describe(error)}") from error
            return task.result()
        finally:
            task.cancel()

    def _check_status(self, address: str, status: int, headers: Mapping[str, str], content: Any) -> None:
        """Raise Retry for a failure that may pass, DistillError for a refusal; return for an answer."""
        if status == 200:
            return
        sentence = _reason(content)
        if status in (401, 403):
            what = f"{address} refuses the token" + (f" ({sentence})" if sentence else "")
            raise ConfigError(f"{what}; set {' or '.join(self._kind.token_names)} to the token of the server")
        if status >= 500 or status in (408, 429):
            seen = f"status {status}" + (f", {sentence}" if sentence else "")
            is_loading = isinstance(content, dict) and content.get("state") == "loading"
            raise Retry(seen, status=status, after_s=_seconds(headers.get("retry-after")), is_loading=is_loading)
        raise DistillError(f"{address} refused a request ({status}): {sentence or 'without a reason'}")


def _json(content: bytes) -> Any:
    """Return the JSON in a body, None if it is none."""
    with contextlib.suppress(ValueError):
        return json.loads(content)
    return None


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
