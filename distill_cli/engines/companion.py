"""A teacher in a second process for each rank: if vLLM cannot hold both engines in one, or if both work at once.

The companions of all ranks form a process group of their own, so that a teacher is cut over them as it would be over
the ranks. Requests and answers go over a socket: shared memory would outlive a process that is killed.
`CompanionTeacher` is the rank's side of it, `serve` the companion's. The engines of a scoring server and of
`distill chat` (`serving.engine_processes`) are companions too.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.engines.asked_teacher import AskedTeacher, answer_of
from distill_cli.engines.companion_process import STORE_FILE, death_of, start_process
from distill_cli.engines.process_setup import prepare_process
from distill_cli.engines.settings import EngineSettings
from distill_cli.engines.stepwise import StepwiseTeacher
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.engines.teacher_batches import BatchTeacher
from distill_cli.errors import DistillError

BUILDERS: dict[str, Callable[..., VllmTeacher]] = {
    "start": VllmTeacher,
    "start_batches": BatchTeacher,
    "start_stepwise": StepwiseTeacher,
}
"""What the first request builds, by its name."""


def needs_companion(sampler: EngineSettings, teacher: EngineSettings, *, on_gpu: bool) -> bool:
    """Return whether the two engines cannot live in one process, even if they work in turns.

    vLLM cuts the models of a process over the same number of ranks. On CUDA it lets one engine of a process sleep, and
    engines of a process share what their models have in common (the rotary tables), which sleeps with the first.
    """
    return sampler.tensor_parallel != teacher.tensor_parallel or (on_gpu and teacher.sleep_mode)


class CompanionTeacher(AskedTeacher):
    """A `VllmTeacher` in another process. Every rank builds one at the same point: a collective.

    It loads while the rank continues; `wait_ready`, or the first use, waits for it. All methods raise DistillError,
    with the reason, as soon as the process fails or dies.
    """

    def __init__(self, settings: EngineSettings, *, topk: int, temperature: float = 1.0) -> None:
        """Start the process; the arguments are `VllmTeacher`'s."""
        prepare_process()  # the process inherits its environment
        self.num_ranks = settings.tensor_parallel
        self._settings = settings
        self._is_ready = False
        super().__init__()
        host = os.environ.get("MASTER_ADDR", "localhost")
        # The store of the companions' process group, which rank 0 serves.
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
        port = [0 if self._store is None else self._store.port]
        dist.broadcast_object_list(port)  # collective
        self._process, self._connection = start_process(
            {
                "RANK": str(dist.get_rank()),
                "WORLD_SIZE": str(dist.get_world_size()),
                "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port[0]),
            }
        )
        self._start = self._send("start", settings=settings, topk=topk, temperature=temperature)
        if torch.cuda.is_available():
            # Two engines that load at once on one GPU would each count the other's memory as its own.
            self.wait_ready()

    def wait_ready(self) -> None:
        """Block until the teacher can score; raises what building it raised, after ending the process."""
        if not self._is_ready:
            try:
                self._answer(self._start)
            except DistillError:
                self.close()
                raise
            self._is_ready = True

    def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache; does nothing without `settings.sleep_mode`."""
        if self._settings.sleep_mode:
            self._call("sleep")

    def wake(self) -> None:
        """Bring the weights back; does nothing without `settings.sleep_mode`."""
        if self._settings.sleep_mode:
            self._call("wake")

    def close(self) -> None:
        """End the process; closing again does nothing."""
        self._process.kill()  # it has no state to save, and may be blocked in a collective
        self._process.wait()
        self._connection.close()
        self._store = None

    def _put(self, method: str, arguments: dict[str, Any]) -> None:
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise self._death() from None

    def _take(self) -> Any:
        """Return the next answer; a dead process closes its end, or is noticed within a second."""
        try:
            while not self._connection.poll(1.0):
                if self._process.poll() is not None:
                    raise self._death()
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None

    def _death(self) -> DistillError:
        if self._connection.closed:
            return DistillError("the teacher is closed")
        return death_of(self._process, f"the process of the teacher ({self._settings.path})")


def serve(connection: Connection) -> None:
    """Answer the rank's requests in the companion, one after another, until the rank is gone. The first builds it.

    A thread sends the answers: the rank may submit more before it reads them, and both would wait for the other.
    """
    # torch would send a tensor as shared memory.
    ForkingPickler.register(torch.Tensor, lambda tensor: (_from_bits, (_bits(tensor), str(tensor.dtype)[6:])))
    answers = queue.SimpleQueue[Any]()
    threading.Thread(target=_send_all, args=(connection, answers), daemon=True).start()
    teacher = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        if teacher is not None:
            answers.put(answer_of(partial(getattr(teacher, method), **arguments)))
            continue
        built = answer_of(partial(build, BUILDERS[method], arguments))
        teacher = None if isinstance(built, DistillError) else built
        answers.put(built if teacher is None else None)


def build(builder: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Join the other companions and return the teacher. A collective."""
    join_companions()
    return builder(**arguments)


def _bits(tensor: torch.Tensor) -> Any:
    """Return a tensor as an array; bfloat16, which numpy lacks, by its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _from_bits(array: Any, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _send_all(connection: Connection, answers: queue.SimpleQueue[Any]) -> None:
    with suppress(OSError):  # the rank is gone
        while True:
            connection.send(answers.get())


def join_companions() -> None:
    """Join the process group of all companions, apart from the ranks'. A collective.

    They meet at rank 0's store; those of a scoring server, which has no torch, at the file `STORE_FILE`, if it is not
    empty: a companion alone needs none.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store: dist.Store
    if (file := os.environ.get(STORE_FILE)) is not None:
        store = dist.FileStore(file, world_size) if file else dist.HashStore()
    else:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
