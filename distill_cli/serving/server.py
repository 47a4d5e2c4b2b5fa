"""The process of a scoring server: check how it may be reached, start engines, serve until a signal or a failure."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.wire import TOKEN, token_problem
from distill_cli.errors import ConfigError, DistillError
from distill_cli.serving import app as application
from distill_cli.serving.app import State, make_app
from distill_cli.serving.dispatcher import Budget, Dispatcher
from distill_cli.serving.engine_processes import EngineProcesses
from distill_cli.serving.fair_queue import FairQueue
from distill_cli.serving.server_metrics import ServerMetrics

log = logging.getLogger(__name__)

DRAIN_S = 20.0
"""How long requests that have been accepted may take when the server is stopped."""
SEND_S = 5.0
"""How long their answers may take to be sent."""
CPU_BUDGET = Budget(score=8192, sample=65536)
GPU_BUDGET = Budget(score=32768, sample=1048576)
"""Tokens of a batch by kind of device; those of an answer count as `max_new_tokens`. Larger batches are no faster on
CPUs (scripts/bench_serve.py), and the clients wait longer for their turns."""


@dataclass(frozen=True)
class Listen:
    """Where a server is reached."""

    host: str
    port: int
    """0 is any that is free."""
    certificate: Path | None = None
    key: Path | None = None
    public: str | None = None
    """Host name or IP address at which clients reach it; None is `host`, or this machine's name."""

    @property
    def scheme(self) -> str:
        return "https" if self.certificate else "http"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is reached on this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_listen(listen: Listen, token: str | None) -> None:
    """Raise ConfigError if requests would travel in the clear or without a token, or a file is missing."""
    problems = [] if token is None or (problem := token_problem(token)) is None else [problem]
    if (listen.certificate is None) != (listen.key is None):
        problems.append("--certificate, --key: one is given without the other; give both")
    if not is_loopback(listen.host):
        others = f"--host {listen.host}: other machines reach it"
        if not token:
            problems.append(f"{others}, and {TOKEN} is not set; set it to a secret, here and for the clients")
        if listen.certificate is None:
            fix = "give --certificate and --key, or --host 127.0.0.1"
            problems.append(f"{others}, and the token would travel in the clear; {fix}")
    if not problems and listen.certificate is not None and listen.key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(listen.certificate, listen.key)
        except OSError as error:  # the base of ssl's errors
            problems.append(f"--certificate {listen.certificate}, --key {listen.key}: cannot be used ({error})")
    if problems:
        raise ConfigError(*problems)


def bind(listen: Listen) -> socket.socket:
    """Return a socket that listens. Raises ConfigError if the address is not free, or not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        fix = "give another --port or --host"
        where = f"--host {listen.host} --port {listen.port}"
        raise ConfigError(f"{where}: cannot listen there ({error.strerror}); {fix}") from error


class ScoringServer:
    """Serves until it is stopped; `run` is called once."""

    def __init__(
        self,
        info: ServerInfo,
        folder: Path,
        *,
        listen: Listen,
        processes: EngineProcesses,
        budget: Budget,
        token: str | None,
        fixed_batches: bool,
        on_ready: Callable[[str], object],
        on_listen: Callable[[str], object] | None = None,
        signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM),
    ) -> None:
        """Take what is served; nothing starts yet.

        Args:
            folder: the model's.
            fixed_batches: see `Dispatcher`.
            on_ready: called with the server's address when it can score.
            on_listen: called with the address when it listens; the model is loaded after that.
            signals: those that stop it.
        """
        self._info, self._folder, self._listen = info, folder, listen
        self._processes, self._budget, self._token, self._on_ready = processes, budget, token, on_ready
        self._fixed_batches, self._on_listen, self._stop_signals = fixed_batches, on_listen, signals
        self._state = State()
        self._failure: DistillError | None = None
        self._signums: list[int] = []
        """Signals received so far; the first one stopped the server."""
        self._stopped = asyncio.Event()

    def run(self) -> int:
        """Serve until a signal; return its number.

        Raises:
            ConfigError: the address is not free, or the model cannot be served.
            DistillError: an engine failed or died.
        """
        check_listen(self._listen, self._token)
        with bind(self._listen) as listener:
            loop = uvicorn.Config("", loop="auto").get_loop_factory()
            with asyncio.Runner(loop_factory=loop) as runner:
                runner.run(self._serve(listener))
        if self._failure is not None:
            raise self._failure
        return self._signums[0] if self._signums else signal.SIGTERM

    async def _serve(self, listener: socket.socket) -> None:
        metrics = ServerMetrics()
        queue = FairQueue(max_tokens=self._info.max_queued_tokens)
        dispatcher = Dispatcher(queue, self._budget, metrics, fixed_batches=self._fixed_batches)
        metrics.gauge("distill_queued_tokens", "Tokens that wait for an engine.", lambda: queue.num_tokens)
        metrics.gauge("distill_waiting_clients", "Clients whose tokens wait.", lambda: queue.num_clients)
        for signum in self._stop_signals:
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal, signum)
        dispatcher.failure.add_done_callback(lambda done: None if done.cancelled() else self._fail(done.result()))
        http = self._http(dispatcher, metrics)
        if self._on_listen is not None:
            self._on_listen(self._address(listener.getsockname()[1]))
        served = asyncio.create_task(http.serve(sockets=[listener]))
        served.add_done_callback(lambda _: self._stopped.set())
        loaded = asyncio.create_task(self._load(dispatcher, listener))
        loaded.add_done_callback(lambda task: None if task.cancelled() or not task.exception() else self._stopped.set())
        try:
            await self._stopped.wait()
            self._state.now = application.STOPPING
            loaded.cancel()
            await dispatcher.stop(within_s=0.0 if self._failure else DRAIN_S)
            http.should_exit = True
            await served
            with suppress(asyncio.CancelledError):
                await loaded
        finally:
            self._processes.kill()

    def _http(self, dispatcher: Dispatcher, metrics: ServerMetrics) -> uvicorn.Server:
        app = make_app(
            self._info, self._folder, dispatcher=dispatcher, metrics=metrics, state=self._state, token=self._token
        )
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            ssl_certfile=self._listen.certificate,
            ssl_keyfile=self._listen.key,
            timeout_graceful_shutdown=int(SEND_S),
            timeout_keep_alive=120,  # clients pause while they train
        )
        return _Http(config)

    async def _load(self, dispatcher: Dispatcher, listener: socket.socket) -> None:
        try:
            await self._processes.start(max_topk=self._info.max_topk, on_death=self._fail)
        except DistillError as error:
            self._fail(error)
            return
        dispatcher.feed(self._processes.engines)
        self._state.now = application.READY
        self._on_ready(self._address(listener.getsockname()[1]))

    def _address(self, port: int) -> str:
        host = self._listen.public or self._listen.host
        with suppress(ValueError):
            if ipaddress.ip_address(host).is_unspecified:
                host = socket.gethostname()
        return f"{self._listen.scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _fail(self, reason: DistillError) -> None:
        self._failure = self._failure or reason
        self._stopped.set()

    def _on_signal(self, signum: int) -> None:
        if self._signums:  # the second ends at once
            self._processes.kill()
            os._exit(128 + signum)
        self._signums.append(signum)
        self._stopped.set()


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: requests are finished before it stops."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield
