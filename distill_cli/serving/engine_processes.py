"""The engines of a scoring server, or of a chat: companion processes, each behind a socket with a thread for either
direction.

`tensor_parallel` consecutive companions form one engine: they get the same calls in the same order, and the first one's
answers count. Start them in the main thread: the kernel ends them with the thread that started them.
"""

from __future__ import annotations

import asyncio
import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from distill_cli.engines.companion_process import STORE_FILE, death_of, start_process
from distill_cli.engines.settings import EngineSettings
from distill_cli.errors import DistillError
from distill_cli.machine.hardware import threads_of_rank

OnDeath = Callable[[DistillError], object]


class Companion:
    """One companion. Its methods and its futures belong to the event loop that runs when it is started."""

    def __init__(
        self, variables: Mapping[str, str], *, name: str, on_death: OnDeath, output: IO[bytes] | None = None
    ) -> None:
        """Start the process; `on_death` is called with the reason if it ends before `kill`.

        Args:
            output: see `start_process`.
        """
        self._loop = asyncio.get_running_loop()
        self._name, self._on_death = name, on_death
        self._calls = queue.SimpleQueue[Any]()
        self._waiting = deque[asyncio.Future[Any]]()
        self._is_killed = False
        self._death: DistillError | None = None
        self.process, self._connection = start_process(variables, output=output)
        for target in (self._send_all, self._receive_all):
            threading.Thread(target=target, daemon=True).start()

    def call(self, method: str, **arguments: Any) -> asyncio.Future[Any]:
        """Call a method of the teacher; calls are answered in their order. The future raises its DistillError."""
        future = self._loop.create_future()
        if self._death is not None:
            future.set_exception(self._death)
            return future
        self._waiting.append(future)
        self._calls.put((method, arguments))
        return future

    def kill(self) -> None:
        """End the process: it has no state to save, and may be blocked in a collective."""
        self._is_killed = True
        self.process.kill()
        self.process.wait()
        self._calls.put(None)

    def _send_all(self) -> None:
        with suppress(OSError):  # the process is gone, which the other thread reports
            while (call := self._calls.get()) is not None:
                self._connection.send(call)

    def _receive_all(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._loop.call_soon_threadsafe(self._resolve, self._connection.recv())
        reason = death_of(self.process, self._name)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._died, reason)

    def _resolve(self, answer: Any) -> None:
        future = self._waiting.popleft()
        if future.done():  # cancelled
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _died(self, reason: DistillError) -> None:
        self._death = reason
        for future in self._waiting:
            if not future.done():
                future.set_exception(reason)
                future.exception()  # without this, asyncio logs exceptions that no caller retrieves
        self._waiting.clear()
        if not self._is_killed:
            self._on_death(reason)


class Engine:
    """The companions that share one model."""

    def __init__(self, companions: list[Companion]) -> None:
        self._companions = companions

    async def call(self, method: str, **arguments: Any) -> Any:
        """Return the answer of the first companion when all have answered. Raises DistillError."""
        futures = [companion.call(method, **arguments) for companion in self._companions]
        first, *_ = await asyncio.gather(*futures)
        return first


class EngineProcesses:
    """All engines of a server with one model."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        num_ranks: int,
        on_gpus: bool,
        env: Mapping[str, str],
        first_gpu: int = 0,
        num_sharing: int = 1,
        output: IO[bytes] | None = None,
    ) -> None:
        """Take the engines' settings; `start` starts them.

        Args:
            num_ranks: companions; a multiple of `settings.tensor_parallel`.
            on_gpus: each companion has a GPU of its own.
            env: further environment variables of the companions.
            first_gpu: the first companion's among the visible ones.
            num_sharing: models, each with as many companions, that share the CPUs.
            output: see `start_process`.
        """
        self.settings = settings
        self._num_ranks, self._on_gpus, self._env = num_ranks, on_gpus, env
        self._first_gpu, self._num_sharing, self._output = first_gpu, num_sharing, output
        self._companions: list[Companion] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.engines: list[Engine] = []

    @property
    def num_engines(self) -> int:
        return self._num_ranks // self.settings.tensor_parallel

    async def start(self, *, max_topk: int, on_death: OnDeath, builder: str = "start_batches") -> None:
        """Start the processes and load the model in all of them. Raises DistillError if one cannot.

        Args:
            builder: what they build, one of `companion.BUILDERS`.
        """
        name, size = f"an engine's process ({self.settings.path})", self.settings.tensor_parallel
        if size > 1:
            self._folder = tempfile.TemporaryDirectory(prefix="distill-serve-")
        for rank in range(self._num_ranks):
            variables = self._variables(rank)
            self._companions.append(Companion(variables, name=name, on_death=on_death, output=self._output))
        cut = [self._companions[first : first + size] for first in range(0, self._num_ranks, size)]
        engines = [Engine(companions) for companions in cut]
        loads = [engine.call(builder, settings=self.settings, topk=max_topk) for engine in engines]
        await asyncio.gather(*loads)
        self.engines = engines

    def _variables(self, rank: int) -> dict[str, str]:
        """Return the environment variables of a companion, in whose engine ranks and devices begin at 0."""
        engine, inner = divmod(rank, self.settings.tensor_parallel)
        variables = {
            "RANK": str(inner),
            "LOCAL_RANK": str(inner),
            "WORLD_SIZE": str(self.settings.tensor_parallel),
            STORE_FILE: str(Path(self._folder.name, f"engine_{engine}")) if self._folder else "",
        }
        if self._on_gpus:
            size = self.settings.tensor_parallel
            first = self._first_gpu + engine * size
            devices = visible_devices(self._first_gpu + self._num_ranks)[first : first + size]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        else:
            variables["OMP_NUM_THREADS"] = str(threads_of_rank(self._num_ranks * self._num_sharing))
        return {**self._env, **variables}

    def kill(self) -> None:
        """End all processes; ending them again does nothing."""
        for companion in self._companions:
            companion.kill()
        self._companions.clear()
        if self._folder is not None:
            self._folder.cleanup()


def visible_devices(number: int) -> list[str]:
    """Return the names, as in CUDA_VISIBLE_DEVICES, of this many GPUs that this process sees."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(number)] if listed is None else listed.split(",")
    return [name.strip() for name in names][:number]
