"""Save the student and its optimizer to a checkpoint and load them again, on any number of ranks and any mesh.

torch.distributed.checkpoint splits and assembles; files are safetensors (no pickle is written or read). A thread
copies the state to host memory and writes it, on a process group of its own. With `async_save` training continues
meanwhile; only the next optimizer update, which would change the tensors, waits until they are copied.
"""

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from distill_cli.checkpoint import store
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.student.moving import PREFIX, MovingCopy

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
NOT_WEIGHTS = (*MOMENTS, PREFIX)
WEIGHTS_FILE, MOMENTS_FILE = 1, 2
"""Numbers of a rank's files; an export opens only the first."""

Tensors = dict[str, torch.Tensor]
Part = tuple[torch.Tensor, Any]
"""This rank's part of a tensor, and the DTensor's spec; None if the tensor is whole."""


class Saved(Protocol):
    """A part of a run's state with a file of its own."""

    def save(self, file: Path) -> None:
        """Write it."""


@dataclass(frozen=True)
class Trainable:
    """What a checkpoint holds, and what it is loaded into."""

    model: torch.nn.Module
    """Its parameters have their Hugging Face names; a checkpoint holds only those that are trained."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    base: str | None = None
    """`model_files.fingerprint` of the frozen weights, which no checkpoint holds; None if all are trained."""
    after_load: Callable[[], object] = lambda: None
    """Called after the optimizer's state is read; `OptimizerOffload.to_rest` with an offloaded optimizer."""
    copies: Sequence[MovingCopy] = ()
    """The weights of moving teachers."""

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def tensors(self, *, with_optimizer: bool) -> Tensors:
        """Return the live tensors by name; DTensors as they are sharded."""
        tensors: Tensors = {name: param.detach() for name, param in self.parameters()}
        for copy in self.copies:
            tensors |= copy.tensors()
        if with_optimizer:
            for name, param in self.parameters():
                state = self.optimizer.state.get(param)
                tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if state}
        return tensors

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far."""
        return self.schedule.last_epoch


@dataclass(eq=False, kw_only=True)
class Saver:
    """Write a run's checkpoints. Build one on every rank and call it at the same steps: both are collectives."""

    run: RunDir = field(kw_only=False)
    trainable: Trainable = field(kw_only=False)
    last_step: int = 0
    """The newest step that `save` was called for; at first that of the checkpoint that the run resumes from."""
    prune: Callable[[Path], object] = lambda _root: None
    """Called with the checkpoints' folder after each is written, to remove older ones: `store.prune`."""
    save_optimizer: bool = True
    """Save AdamW's moments too; a resumed run is exact only with them."""
    async_save: bool = True
    """Return from `save` before the checkpoint is on disk."""
    stopped_s: float = 0.0
    """Seconds that training has waited for checkpoints."""

    def __post_init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # the thread's: the trainer's own is in use meanwhile
        self._host: Tensors = {}  # this rank's tensors in host memory, allocated once and reused
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.trainable.optimizer.register_step_pre_hook(self._wait_for_copy)

    def save(self, step: int, state: dict[str, Any], *, in_flight: Saved | None = None) -> None:
        """Write the checkpoint of `step`, in the background with `async_save`.

        A checkpoint that cannot be written (a full disk) is a warning: earlier ones stay, and training goes on.

        Args:
            state: returned by `load`; JSON. Its `metrics` are the step's.
            in_flight: written into a file of its own (`store.IN_FLIGHT`), by the first rank.
        """
        begin = time.perf_counter()
        self.finish()
        self.last_step = step
        trainable = self.trainable
        # The storage that holds the values now: a DTensor and the optimizer's state may get another one later.
        parts = {
            name: (tensor.to_local(), tensor._spec) if isinstance(tensor, DTensor) else (tensor, None)
            for name, tensor in trainable.tensors(with_optimizer=self.save_optimizer).items()
        }
        state = {"step": step, **state, "num_updates": trainable.num_updates, "base": trainable.base}
        state["num_ranks"] = dist.get_world_size()
        now = torch.cuda.current_stream().record_event() if self._stream else None
        self._copied.clear()
        args = (step, parts, now, state, random_states(), in_flight)
        self._thread = threading.Thread(target=self._copy_and_write, args=args, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.async_save:
            self.finish()
        self.stopped_s += time.perf_counter() - begin

    def _wait_for_copy(self, *_: Any) -> None:
        begin = time.perf_counter()
        self._copied.wait()
        self.stopped_s += time.perf_counter() - begin

    def finish(self) -> None:
        """Block until the pending checkpoint is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Block until the pending checkpoint is on disk; free the host memory."""
        log.info("checkpoints have stopped training for %.3f s in all", self.stopped_s)
        self.finish()
        self._host.clear()

    def _copy_and_write(
        self,
        step: int,
        parts: dict[str, Part],
        now: torch.cuda.Event | None,
        state: dict[str, Any],
        rank_state: Any,
        in_flight: Saved | None,
    ) -> None:
        problem, copies = None, {}
        if self._stream is not None:  # a new thread is on the first GPU, and would allocate there
            torch.cuda.set_device(self._stream.device)
        try:
            copies = self._copy_to_host(parts, after=now)
        except (RuntimeError, MemoryError) as error:  # no host memory
            problem = _root_cause(error)
        finally:
            self._copied.set()
        failed = [one for one in self._gather(problem) if one]  # on any rank: none enters dcp
        written = failed or self._gather(self._write(step, copies, state, rank_state, in_flight))
        if dist.get_rank() == 0:
            self._seal(step, written)

    def _copy_to_host(self, parts: dict[str, Part], *, after: torch.cuda.Event | None) -> Tensors:
        """Return copies with the same layouts, valid until the next call. The GPU copies after the event `after`."""
        copies: Tensors = {}
        with torch.cuda.stream(self._stream):  # None has no effect
            if self._stream and after:
                self._stream.wait_event(after)
            for name, (local, spec) in parts.items():
                if name not in self._host:
                    self._host[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
                host = self._host[name].copy_(local, non_blocking=True)
                # DTensor.from_local would move it back to the mesh's device.
                copies[name] = DTensor(host, spec, requires_grad=False) if spec else host
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _write(
        self, step: int, tensors: Tensors, state: dict[str, Any], rank_state: Any, in_flight: Saved | None
    ) -> dict[str, Any] | str:
        """Write this rank's files; return their entries in the manifest, or why they could not be written."""
        rank, temporary = dist.get_rank(), atomic_dir.hidden(store.folder(self.run.checkpoints, step), "tmp")
        try:
            files = {name: MOMENTS_FILE if name.startswith(NOT_WEIGHTS) else WEIGHTS_FILE for name in tensors}
            writer = dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            write_json(temporary / f"rank_{rank}.json", rank_state)
            mine = [temporary / f"rank_{rank}.json", *temporary.glob(f"shard-{rank + 1:05}-*")]
            if rank == 0:
                trackers = read_json(self.run.trackers) if self.run.trackers.exists() else {}
                write_json(temporary / store.STATE, {**state, "trackers": trackers})
                shutil.copyfile(self.run.config, temporary / store.CONFIG)
                mine += [temporary / store.STATE, temporary / store.CONFIG]
                if in_flight is not None:
                    in_flight.save(temporary / store.IN_FLIGHT)
                    mine.append(temporary / store.IN_FLIGHT)
            return atomic_dir.describe(mine)
        except (Exception, dcp.api.CheckpointException) as error:  # a file system's errors, on any rank
            log.info("the checkpoint of step %d", step, exc_info=True)  # the main rank warns in one line
            return _root_cause(error)

    def _seal(self, step: int, everyone: list[dict[str, Any] | str]) -> None:
        """Complete the checkpoint from the ranks' manifest entries, or remove it after a rank's error."""
        root = self.run.checkpoints
        final = store.folder(root, step)
        temporary = atomic_dir.hidden(final, "tmp")
        entries: dict[str, Any] = {}
        try:
            for part in everyone:
                if isinstance(part, str):
                    raise DistillError(part)
                entries |= part
            # A machine that loses power must not keep the checkpoint and lose the steps that led to it.
            for path in (self.run.metrics, self.run.config, root, self.run.path):
                if path.exists():
                    atomic_dir.flush(path)
            atomic_dir.seal(temporary, final, entries)
            self.prune(root)
        except (OSError, DistillError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = store.find(root)
            left = f"{kept[-1].path.name} is kept" if kept else "there is no earlier one"
            log.warning("no checkpoint of step %d: %s; %s; training goes on", step, error, left)


def load(path: Path, trainable: Trainable) -> dict[str, Any]:
    """Load the student, its optimizer and schedule, and the random states; return the state that `save` received.

    A collective. The checkpoint may come from another number of ranks and another mesh; with another number of ranks
    the random states stay as they are (sampling has seeds of its own).

    Raises:
        ConfigError: the checkpoint's parameters are not the student's.
    """
    state: dict[str, Any] = read_json(path / store.STATE)
    reader = dcp.HuggingFaceStorageReader(str(path))
    names = reader.read_metadata().state_dict_metadata.keys()
    expected = set(trainable.tensors(with_optimizer=False))
    others = {name for name in names if not name.startswith(MOMENTS)} ^ expected
    if others:
        raise ConfigError(f"{path}: is of another model: {min(others)} is not in both; give that model")
    with_optimizer = any(name.startswith(MOMENTS) for name in names)
    if with_optimizer:
        start_moments(trainable, num_updates=state["num_updates"])
    else:
        log.warning("%s has no optimizer state (checkpoint.save_optimizer=false): AdamW's moments start anew", path)
    group = dist.new_group(backend="gloo")
    try:
        dcp.load(trainable.tensors(with_optimizer=with_optimizer), storage_reader=reader, process_group=group)
    except (Exception, dcp.api.CheckpointException) as error:
        raise ConfigError(f"{path}: is of another model: {_root_cause(error)}; give that model") from error
    dist.destroy_process_group(group)
    trainable.after_load()
    for copy in trainable.copies:
        copy.loaded()
    set_num_updates(trainable.schedule, state["num_updates"])
    if state["num_ranks"] == dist.get_world_size():
        set_random_states(read_json(path / f"rank_{dist.get_rank()}.json"))
    return state


def start_moments(trainable: Trainable, *, num_updates: int) -> None:
    """Create AdamW's state as its first update does, to read a checkpoint into it."""
    for _, param in trainable.parameters():
        trainable.optimizer.state[param] = {
            "step": torch.tensor(float(num_updates)),
            **{moment: torch.zeros_like(param.detach()) for moment in MOMENTS},
        }


def set_num_updates(schedule: torch.optim.lr_scheduler.LambdaLR, num_updates: int) -> None:
    """Set the learning rate to its value after `num_updates` updates: a function of their number alone."""
    schedule.last_epoch = num_updates
    rates = [base * factor(num_updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def random_states() -> dict[str, Any]:
    """Return the states of this process's generators (Python, NumPy, torch on CPU and on its GPU) as JSON."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    states: dict[str, Any] = {"python": random.getstate(), "numpy": numpy}
    return states | {name: bytes(get().tolist()).hex() for name, get, _ in _torch_generators()}


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(states["numpy"])
    for name, _, restore in _torch_generators():
        if name in states:
            restore(torch.tensor(list(bytes.fromhex(states[name])), dtype=torch.uint8))


def _torch_generators() -> list[tuple[str, Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]]:
    on_gpu = [("cuda", torch.cuda.get_rng_state, torch.cuda.set_rng_state)] if torch.cuda.is_available() else []
    return [("torch", torch.get_rng_state, torch.set_rng_state), *on_gpu]


def _root_cause(error: BaseException) -> str:
    """Return the first error that dcp collected from the ranks, in one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:400] or type(error).__name__
