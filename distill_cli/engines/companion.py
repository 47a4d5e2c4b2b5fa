"""A teacher in a process of its own for each rank, on the rank's device, for what one process cannot hold.

The companions of all ranks form a process group of their own, so that a teacher is cut over them as it would be over
the ranks. Requests and answers go over a socket: shared memory would outlive a process that is killed.
`CompanionTeacher` is the rank's side of it, `serve` the companion's.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distill_cli.engines.base import Teacher
from distill_cli.engines.engine import check_settings, reason
from distill_cli.engines.process_setup import is_prepared, prepare_process
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.errors import ConfigError, DistillError, Killed
from distill_cli.machine.processes import describe_exit
from distill_cli.types import Sample, TeacherScores

EXIT_S = 10.0
"""How long a companion that closed its socket may take to be gone."""


def needs_companion(sampler: EngineSettings, teacher: EngineSettings, *, on_gpu: bool) -> bool:
    """Whether the two engines cannot live in one process.

    vLLM cuts the models of a process over the same number of ranks. On CUDA it lets one engine of a process sleep, and
    engines of a process share what their models have in common (the rotary tables), which sleeps with the first.
    """
    return sampler.tensor_parallel != teacher.tensor_parallel or (on_gpu and teacher.sleep_mode)


class CompanionTeacher(Teacher):
    """A `VllmTeacher` in another process. Every rank builds one at the same point: a collective.

    It loads while the rank goes on; `wait_ready`, or the first use, waits for it. All methods raise DistillError, with
    the reason, as soon as the process fails or dies.
    """

    def __init__(self, settings: EngineSettings, *, topk: int, temperature: float = 1.0) -> None:
        """Start the process; the arguments are `VllmTeacher`'s."""
        check_settings(settings, role="the teacher")
        if not is_prepared():
            prepare_process()  # the process inherits it
        self.num_ranks = settings.tensor_parallel
        self._settings = settings
        self._is_ready = False
        host = os.environ.get("MASTER_ADDR", "localhost")
        self._store, port = open_store(host)  # collective
        self._process, self._connection = start_process(
            {
                "RANK": str(dist.get_rank()),
                "WORLD_SIZE": str(dist.get_world_size()),
                "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
            }
        )
        self._send("start", settings=settings, topk=topk, temperature=temperature)
        if torch.cuda.is_available():
            # Two engines that load at once on one GPU would each take the other's memory for its own.
            self.wait_ready()

    def wait_ready(self) -> None:
        if not self._is_ready:
            try:
                self._receive()
            except DistillError:
                self.close()
                raise
            self._is_ready = True

    def score(self, sequences: Sequence[list[int]], *, response_starts: Sequence[int]) -> list[TeacherScores]:
        packed = self._call("score", sequences=list(sequences), response_starts=list(response_starts))
        return packed.unpack()

    def sample(self, prompts: Sequence[list[int]], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        return self._call("sample", prompts=list(prompts), seeds=list(seeds), sampling=sampling)

    def sleep(self) -> None:
        if self._settings.sleep_mode:
            self._call("sleep")

    def wake(self) -> None:
        if self._settings.sleep_mode:
            self._call("wake")

    def close(self) -> None:
        """End the process; closing again does nothing."""
        self._process.kill()  # it holds nothing worth a farewell, and may stand in a collective
        self._process.wait()
        self._connection.close()
        self._store = None

    def _call(self, method: str, **arguments: Any) -> Any:
        self.wait_ready()
        self._send(method, **arguments)
        return self._receive()

    def _send(self, method: str, **arguments: Any) -> None:
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise self._death() from None

    def _receive(self) -> Any:
        """The answer to the oldest request; a process that is gone closes its end, or is seen within a second."""
        try:
            while not self._connection.poll(1.0):
                if self._process.poll() is not None:
                    raise self._death()
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, Failure):
            raise ConfigError(*answer.problems) if answer.problems else DistillError(answer.message)
        return answer

    def _death(self) -> DistillError:
        if self._connection.closed:
            return DistillError("the teacher is closed")
        try:
            status = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return Killed(f"the process of the teacher ({self._settings.path}) does not answer")
        kind = Killed if status < 0 else DistillError
        return kind(f"the process of the teacher ({self._settings.path}) {describe_exit(status)}")


@dataclass(frozen=True)
class Failure:
    """What went wrong in a companion."""

    message: str
    """One line."""
    problems: tuple[str, ...] = ()
    """Of a ConfigError."""


@dataclass(frozen=True)
class PackedScores:
    """The scores of all sequences of a call end to end. Arrays, since a tensor would be sent as shared memory."""

    lengths: list[int]
    arrays: tuple[np.ndarray, ...]
    """In the order of TeacherScores' fields; none if nothing was scored."""

    @classmethod
    def pack(cls, scores: Sequence[TeacherScores]) -> PackedScores:
        if not scores:
            return cls([], ())
        whole = TeacherScores.cat(scores)
        arrays = tuple(getattr(whole, field.name).numpy() for field in fields(whole))
        return cls([len(score.sampled_logp) for score in scores], arrays)

    def unpack(self) -> list[TeacherScores]:
        parts = zip(*(torch.from_numpy(array).split(self.lengths) for array in self.arrays), strict=True)
        return [TeacherScores(*tensors) for tensors in parts]


def open_store(host: str) -> tuple[dist.TCPStore | None, int]:
    """Where the companions meet, kept by rank 0, and its port, which the kernel chose. A collective."""
    store, port = None, [0]
    if dist.get_rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port)  # collective
    return store, port[0]


def start_process(variables: dict[str, str]) -> tuple[subprocess.Popen, Connection]:
    """A companion with these environment variables beside the rank's own, and the rank's end of the socket to it.

    Its output goes where the rank's goes.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "distill_cli.engines.companion_process", str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, **variables},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return process, Connection(ours.detach())


def serve(connection: Connection) -> None:
    """In the companion: answer one request after the other until the rank is gone."""
    companion = Companion()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(companion, method)(**arguments)
        except Exception as error:
            traceback.print_exc()
            answer = to_failure(error)
        connection.send(answer)


class Companion:
    """What a companion answers, by the name of the request."""

    def start(self, **arguments: Any) -> None:
        join_companions()  # collective
        self._teacher = VllmTeacher(**arguments)

    def score(self, **arguments: Any) -> PackedScores:
        return PackedScores.pack(self._teacher.score(**arguments))

    def sample(self, **arguments: Any) -> list[Sample]:
        return self._teacher.sample(**arguments)

    def sleep(self) -> None:
        self._teacher.sleep()

    def wake(self) -> None:
        self._teacher.wake()


def join_companions() -> None:
    """The process group of all companions, apart from the ranks'. A collective."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def to_failure(error: Exception) -> Failure:
    if isinstance(error, DistillError):
        return Failure(str(error), error.problems if isinstance(error, ConfigError) else ())
    return Failure(f"the teacher failed: {reason(error)}")
