"""The ranks' side: the student and its optimizer into a checkpoint and back, on any number of ranks and any mesh.

torch.distributed.checkpoint cuts and puts together; files are safetensors (no pickle is written or read). With
`checkpoint.async_save` a thread copies the state to host memory and writes it, on a process group of its own. Training
goes on meanwhile; only an optimizer's step, which changes what is being copied, waits for the copy.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from distill_cli.checkpoint import store
from distill_cli.config.schema import CheckpointConfig
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import RunDir, write_json

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS_FILE, MOMENTS_FILE = 1, 2
"""Numbers of a rank's files: an export opens the first only."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trainable:
    """What a checkpoint is made of, and what it is loaded into."""

    model: torch.nn.Module
    """Parameters under their Hugging Face names; only those that are trained are kept."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    base: str | None = None
    """`modelpath.fingerprint` of the weights that are not trained, and in no checkpoint."""
    after_load: Callable[[], object] = lambda: None
    """Called when the optimizer's state has been read: `OptimizerOffload` brings it to where it rests."""

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def tensors(self, *, with_optimizer: bool) -> Tensors:
        """The live tensors by name; DTensors as they are cut."""
        tensors: Tensors = {name: param.detach() for name, param in self.parameters()}
        if with_optimizer:
            for name, param in self.parameters():
                state = self.optimizer.state.get(param)
                tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if state}
        return tensors

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far."""
        return self.schedule.last_epoch


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor."""

    local: torch.Tensor
    spec: Any
    """Of a DTensor; None where the tensor is whole."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Part:
        return cls(tensor.to_local(), tensor._spec) if isinstance(tensor, DTensor) else cls(tensor, None)


class HostCopy:
    """A copy of this rank's tensors in host memory, which is taken once and used again for each checkpoint."""

    def __init__(self) -> None:
        self._host: Tensors = {}
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def take(self, tensors: Mapping[str, Part], *, after: torch.cuda.Event | None) -> Tensors:
        """The same names and layouts, with values that stay as they are now until the next call.

        Args:
            after: what the GPU has to be done with before it copies.
        """
        copies: Tensors = {}
        with torch.cuda.stream(self._stream):  # without effect where there is none
            if after is not None:
                self._stream.wait_event(after)
            for name, part in tensors.items():
                if name not in self._host:
                    self._host[name] = torch.empty_like(part.local, device="cpu", pin_memory=part.local.is_cuda)
                host = self._host[name].copy_(part.local, non_blocking=True)
                # DTensor.from_local would carry it back to the mesh's device.
                copies[name] = DTensor(host, part.spec, requires_grad=False) if part.spec else host
        if self._stream is not None:
            self._stream.synchronize()
        return copies


class Saver:
    """Writes checkpoints. Every rank has one and calls it at the same steps: a collective."""

    def __init__(self, run: RunDir, settings: CheckpointConfig, trainable: Trainable) -> None:
        self._run, self._settings, self._trainable = run, settings, trainable
        self._group = dist.new_group(backend="gloo")  # the thread's: the trainer's own is in use meanwhile
        self._host_copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._copied = threading.Event()
        self._copied.set()
        trainable.optimizer.register_step_pre_hook(self._wait_for_copy)
        self.last_step = 0
        """The newest step that `save` was called for."""
        self.stopped_s = 0.0
        """How long training has stood still for checkpoints."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, in the background unless the config says otherwise.

        One that cannot be written (a full disk) is a warning: what was there before stays, and training goes on.

        Args:
            state: what `load` gives back; JSON. `metrics` are the step's.
        """
        begin = time.perf_counter()
        self.finish()
        self.last_step = step
        # What holds the values now, whatever object a DTensor or an optimizer's state is made of later.
        parts = {
            name: Part.of(tensor)
            for name, tensor in self._trainable.tensors(with_optimizer=self._settings.save_optimizer).items()
        }
        state = {"step": step, **state, "num_updates": self._trainable.num_updates, "num_ranks": dist.get_world_size()}
        state["base"] = self._trainable.base
        now = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._copied.clear()
        self._thread = threading.Thread(
            target=self._copy_and_write,
            args=(step, parts, now, state, random_states()),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()
        if not self._settings.async_save:
            self.finish()
        self.stopped_s += time.perf_counter() - begin

    def _wait_for_copy(self, *_: Any) -> None:
        begin = time.perf_counter()
        self._copied.wait()
        self.stopped_s += time.perf_counter() - begin

    def finish(self) -> None:
        """Until what is being written is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        log.info("checkpoints have stopped training for %.3f s in all", self.stopped_s)
        self.finish()
        self._host_copy = HostCopy()

    def _copy_and_write(
        self,
        step: int,
        parts: Mapping[str, Part],
        now: torch.cuda.Event | None,
        state: dict[str, Any],
        randomness: dict[str, Any],
    ) -> None:
        problem, tensors = None, {}
        if self._device is not None:  # a thread begins on the first GPU, and would take memory there
            torch.cuda.set_device(self._device)
        try:
            tensors = self._host_copy.take(parts, after=now)
        except (RuntimeError, MemoryError) as error:  # no host memory
            problem = _root_cause(error)
        finally:
            self._copied.set()
        problems = [problem for problem in self._gather(problem) if problem]
        if problems:  # on any rank: none enters dcp
            written = [({}, problem) for problem in problems]
        else:
            written = self._gather(self._write(step, tensors, state, randomness))
        if dist.get_rank() == 0:
            self._seal(step, written)

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _write(
        self, step: int, tensors: Tensors, state: dict[str, Any], randomness: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None]:
        """This rank's files: their entries in the manifest, or why they could not be written."""
        rank = dist.get_rank()
        temporary = store.temporary_path(self._run.checkpoints, step)
        try:
            files = {name: MOMENTS_FILE if name.startswith(MOMENTS) else WEIGHTS_FILE for name in tensors}
            writer = dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            write_json(temporary / f"rank_{rank}.json", randomness)
            mine = [temporary / f"rank_{rank}.json", *temporary.glob(f"shard-{rank + 1:05}-*")]
            if rank == 0:
                write_json(temporary / store.STATE, {**state, "mlflow": mlflow_identity(self._run)})
                shutil.copyfile(self._run.config, temporary / store.CONFIG)
                mine += [temporary / store.STATE, temporary / store.CONFIG]
            return atomic_dir.describe(mine), None
        except (Exception, dcp.api.CheckpointException) as error:  # what a file system raises, on one rank or another
            log.info("the checkpoint of step %d", step, exc_info=True)  # the main rank warns in a line
            return {}, _root_cause(error)

    def _seal(self, step: int, everyone: list[tuple[dict[str, Any], str | None]]) -> None:
        root, settings = self._run.checkpoints, self._settings
        temporary = store.temporary_path(root, step)
        problems = [problem for _, problem in everyone if problem]
        try:
            if problems:
                raise DistillError(problems[0])
            # A machine that loses power must not keep the checkpoint and lose the steps that led to it.
            for path in (self._run.metrics, self._run.config, root, self._run.path):
                if path.exists():
                    atomic_dir.flush(path)
            atomic_dir.seal(
                temporary, store.final_path(root, step), {k: v for part, _ in everyone for k, v in part.items()}
            )
            store.prune(
                root,
                keep_top_k=settings.keep_top_k,
                metric=settings.metric,
                higher_is_better=settings.higher_is_better,
            )
        except (OSError, DistillError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = store.find(root)
            log.warning(
                "no checkpoint of step %d: %s; %s; training goes on",
                *(step, error, f"{kept[-1].path.name} is kept" if kept else "there is no earlier one"),
            )


def mlflow_identity(run: RunDir) -> dict[str, str] | None:
    """What the run is found again by in MLflow; None where it is not recorded there."""
    file = run.path / "mlflow.json"
    known = json.loads(file.read_text()) if file.exists() else None
    return known and {name: known[name] for name in ("uri", "experiment", "token")}


def load(path: Path, trainable: Trainable) -> dict[str, Any]:
    """Fills the student, its optimizer and schedule, and the random states; what `save` was given as state.

    A collective. The checkpoint may come from another number of ranks and another mesh; random states then stay as
    they are (what is sampled has seeds of its own).

    Raises:
        ConfigError: the checkpoint's parameters are not the student's.
    """
    state = json.loads((path / store.STATE).read_text())
    reader = dcp.HuggingFaceStorageReader(str(path))
    names = reader.read_metadata().state_dict_metadata.keys()
    others = {name for name in names if not name.startswith(MOMENTS)} ^ {name for name, _ in trainable.parameters()}
    if others:
        raise ConfigError(f"{path}: is of another model: {min(others)} is not in both; give the model that it is of")
    with_optimizer = any(name.startswith(MOMENTS) for name in names)
    if with_optimizer:
        start_moments(trainable, num_updates=state["num_updates"])
    else:
        log.warning("%s has no optimizer state (checkpoint.save_optimizer=false): AdamW's moments start anew", path)
    group = dist.new_group(backend="gloo")
    try:
        dcp.load(trainable.tensors(with_optimizer=with_optimizer), storage_reader=reader, process_group=group)
    except (Exception, dcp.api.CheckpointException) as error:
        raise ConfigError(f"{path}: is of another model: {_root_cause(error)}; give the model that it is of") from error
    dist.destroy_process_group(group)
    trainable.after_load()
    set_num_updates(trainable.schedule, state["num_updates"])
    randomness = path / f"rank_{dist.get_rank()}.json"
    if state["num_ranks"] == dist.get_world_size():
        set_random_states(json.loads(randomness.read_text()))
    return state


def start_moments(trainable: Trainable, *, num_updates: int) -> None:
    """AdamW's state as it is after its first step, for a checkpoint to be read into."""
    for _, param in trainable.parameters():
        trainable.optimizer.state[param] = {
            "step": torch.tensor(float(num_updates)),
            **{moment: torch.zeros_like(param.detach()) for moment in MOMENTS},
        }


def set_num_updates(schedule: torch.optim.lr_scheduler.LambdaLR, num_updates: int) -> None:
    """The learning rate as it is after `num_updates` optimizer steps: a function of their number alone."""
    schedule.last_epoch = num_updates
    rates = [base * factor(num_updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def random_states() -> dict[str, Any]:
    """This process' generators: Python's, NumPy's, torch's on the CPU and on its GPU; as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(states["cuda"]))


def _bytes_tensor(digits: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)


def _root_cause(error: BaseException) -> str:
    """dcp wraps what the ranks raised; the first of them, in one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:400] or type(error).__name__
