"""The routes of a scoring server.

Bodies and answers of /score, /head and /sample are described in `engines.wire`. Every other answer is JSON, errors
`{"error": sentence}`: 401 without the token, 413 and 422 for a bad request, 500 if an engine failed, 503 with
Retry-After while loading, stopping or full.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.wire import CLIENT_HEADER, BadBody, HeadRequest, SampleRequest, ScoreRequest, pack
from distill_cli.errors import ConfigError, DistillError
from distill_cli.models import model_files
from distill_cli.serving import server_metrics
from distill_cli.serving.dispatcher import Dispatcher, ServerStops, Waiting
from distill_cli.serving.fair_queue import QueueFull
from distill_cli.serving.request_checks import check_head, check_sample, check_score
from distill_cli.serving.server_metrics import ServerMetrics

log = logging.getLogger(__name__)

READY, LOADING, STOPPING = "ready", "loading", "stopping"
REASONS = {LOADING: "the model is being loaded", STOPPING: "the server is stopping"}
RETRY_LOADING_S = 2
LEFT = 499
"""Status, in the metrics alone, of a request whose client has closed its connection."""
BODY_TENSORS_BYTES = 16
"""Most bytes of a request's body for each token: sequences of one token with a seed."""
BODY_HEADER_BYTES = 2**17

Parsed = ScoreRequest | SampleRequest
Headers = Mapping[str, str]


class State:
    """What the server is doing: `ready`, `loading` or `stopping`."""

    now = LOADING


class Refused(Exception):
    """A request is refused, with a status and one sentence."""

    def __init__(self, status: int, sentence: str, *, state: str | None = None, **headers: str) -> None:
        """`state` is the server's, if that is why."""
        super().__init__(sentence)
        self.status, self.state = status, state
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Gone(Exception):
    """The client has closed its connection."""


def make_app(
    info: ServerInfo, folder: Path, *, dispatcher: Dispatcher, metrics: ServerMetrics, state: State, token: str | None
) -> ASGIApp:
    """Return the application.

    Args:
        folder: the model's, for its vocabulary and its small files.
        token: every request must carry it; None needs none.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    bodies = Bodies(info, dispatcher, state)
    texts = Texts(vocabulary=partial(model_files.vocabulary, folder), files=partial(model_files.small_files, folder))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _no_route)

    @app.get("/health")
    async def health() -> Response:
        if state.now != READY:
            return _error(503, REASONS[state.now], {"retry-after": str(RETRY_LOADING_S)}, state=state.now)
        return _json({"state": state.now})

    @app.get("/info")
    async def show_info() -> Response:
        return _json(info.to_json())

    @app.get("/vocabulary")
    async def show_vocabulary() -> Response:
        return Response(await texts.get("vocabulary"), media_type="application/json")

    @app.get("/files")
    async def show_files() -> Response:
        return Response(await texts.get("files"), media_type="application/json")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=server_metrics.CONTENT_TYPE)

    @app.post("/score")
    async def score(request: Request) -> Response:
        return await bodies.answer(request, ScoreRequest.parse, partial(check_score, info=info))

    @app.post("/head")
    async def head(request: Request) -> Response:
        return await bodies.head(request)

    @app.post("/sample")
    async def sample(request: Request) -> Response:
        return await bodies.answer(request, SampleRequest.parse, partial(check_sample, info=info))

    return counted(authorized(app, token), metrics)


class Texts:
    """Long answers in JSON that are made at the first request for them."""

    def __init__(self, **makers: Callable[[], Any]) -> None:
        self._makers, self._made, self._lock = makers, dict[str, bytes](), asyncio.Lock()

    async def get(self, name: str) -> bytes:
        """Return the JSON of what the maker with this name returns."""
        async with self._lock:
            if name not in self._made:
                content = await asyncio.to_thread(self._makers[name])
                self._made[name] = json.dumps(content, ensure_ascii=False).encode()
            return self._made[name]


class Bodies:
    """Answer a body of tensors: read, check, queue, wait."""

    def __init__(self, info: ServerInfo, dispatcher: Dispatcher, state: State) -> None:
        self._info, self._dispatcher, self._state = info, dispatcher, state
        self._max_bytes = BODY_TENSORS_BYTES * info.max_queued_tokens + BODY_HEADER_BYTES

    async def answer(
        self, request: Request, parse: Callable[[bytearray], Parsed], check: Callable[[Any], None]
    ) -> Response:
        """Return the answer to a request of sequences. Raises Refused."""
        self._check_ready()
        try:
            parsed = parse(await self._read(request))
            check(parsed)
            self._check_ready()  # it may have begun to stop meanwhile
        except BadBody as error:
            raise Refused(422, str(error)) from None
        except ClientDisconnect:
            return Response(status_code=LEFT)
        peer = request.client.host if request.client else "unknown"
        client = request.headers.get(CLIENT_HEADER, peer)[:100]
        try:
            work = self._dispatcher.submit(parsed, client=client, max_model_len=self._info.max_model_len)
        except QueueFull:
            waiting = f"{self._dispatcher.queue.num_tokens} tokens wait, the limit is {self._info.max_queued_tokens}"
            raise Refused(503, waiting, retry_after=str(self._dispatcher.retry_after())) from None
        try:
            answers = await self._wait(work, request)
        except DistillError as error:
            raise Refused(500, str(error)) from None
        except ServerStops:
            raise Refused(503, REASONS[STOPPING], retry_after=str(RETRY_LOADING_S)) from None
        except Gone:
            return Response(status_code=LEFT)
        except asyncio.CancelledError:  # the server stops, or the connection is torn down
            self._dispatcher.cancel(work)
            raise
        return Response(pack({name: [one[name] for one in answers] for name in answers[0]}))

    async def head(self, request: Request) -> Response:
        """Return rows of the model's head. Raises Refused."""
        self._check_ready()
        try:
            wanted = HeadRequest.parse(await self._read(request))
            check_head(wanted, info=self._info)
        except BadBody as error:
            raise Refused(422, str(error)) from None
        except ClientDisconnect:
            return Response(status_code=LEFT)
        try:
            arrays, metadata = await self._dispatcher.ask("head_rows", begin=wanted.begin, end=wanted.end)
        except DistillError as error:
            raise Refused(422 if isinstance(error, ConfigError) else 500, str(error)) from None
        return Response(pack({name: [array] for name, array in arrays.items()}, metadata))

    def _check_ready(self) -> None:
        """Raise Refused while nothing is scored."""
        if self._state.now != READY:
            now = self._state.now
            raise Refused(503, REASONS[now], state=now, retry_after=str(RETRY_LOADING_S))

    async def _read(self, request: Request) -> bytearray:
        """Return the body. Raises Refused if it is too large."""
        body = bytearray()
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large(int(length))
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                raise self._too_large(len(body))
        return body

    def _too_large(self, size: int) -> Refused:
        what = f"the body has {size} bytes or more, the limit is {self._max_bytes}; send fewer sequences at once"
        return Refused(413, what, connection="close")

    async def _wait(self, work: Waiting, request: Request) -> list[Any]:
        """Return the answers. Raises Gone if the client has left, whose work is dropped, and the engine's error."""
        left = asyncio.create_task(_disconnect(request))
        try:
            either: set[asyncio.Future[Any]] = {work.done, left}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done.done():
                self._dispatcher.cancel(work)
                raise Gone
            return work.done.result()
        finally:
            left.cancel()
            with suppress(asyncio.CancelledError):
                await left


async def _disconnect(request: Request) -> None:
    """Return when the client has closed its connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def authorized(app: ASGIApp, token: str | None) -> ASGIApp:
    """Answer 401 to requests without the token, whatever their route and before their body is read."""
    expected = None if token is None else f"Bearer {token}".encode()

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and expected is not None:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, expected):
                what = "the token of this server is needed: Authorization: Bearer TOKEN"
                headers = {"www-authenticate": "Bearer", "connection": "close"}
                await _error(401, what, headers)(scope, receive, send)
                return
        await app(scope, receive, send)

    return check


ROUTES = {"/health", "/info", "/vocabulary", "/files", "/metrics", "/score", "/head", "/sample"}


def counted(app: ASGIApp, metrics: ServerMetrics) -> ASGIApp:
    """Count each answer by route and status, in `metrics`."""

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in ROUTES else "other"
                metrics.request(path, message["status"])
            await send(message)

        await app(scope, receive, note if scope["type"] == "http" else send)

    return count


def _json(content: Any, status: int = 200, headers: Headers | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode()
    return Response(body, status, dict(headers or {}), media_type="application/json")


def _error(status: int, sentence: str, headers: Headers | None = None, **more: str) -> Response:
    return _json({"error": sentence, **more}, status, headers)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, str(error), error.headers, **({"state": error.state} if error.state else {}))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}; the routes are {', '.join(sorted(ROUTES))}"
    return _error(error.status_code, what, error.headers)
