"""The ranks' side: the student and its optimizer into a checkpoint and back, on any number of ranks and any mesh.

torch.distributed.checkpoint cuts and puts together; files are safetensors (no pickle is written or read). With
`checkpoint.async_save` training goes on as soon as the state is copied to host memory; a thread writes it, on a process
group of its own.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import threading
from collections.abc import Iterator
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
from distill_cli.errors import DistillError
from distill_cli.rundir import RunDir, write_json

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


class HostCopy:
    """A copy of this rank's tensors in host memory, which is taken once and used again for each checkpoint."""

    def __init__(self) -> None:
        self._host: Tensors = {}

    def take(self, tensors: Tensors) -> Tensors:
        """The same names and layouts, with values that stay as they are now until the next call."""
        copies: Tensors = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if name not in self._host:
                self._host[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            host = self._host[name].copy_(local, non_blocking=True)
            # DTensor.from_local would carry it back to the mesh's device.
            copies[name] = DTensor(host, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else host
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies


class Saver:
    """Writes checkpoints. Every rank has one and calls it at the same steps: a collective."""

    def __init__(self, run: RunDir, settings: CheckpointConfig, trainable: Trainable) -> None:
        self._run, self._settings, self._trainable = run, settings, trainable
        self._group = dist.new_group(backend="gloo")  # the thread's: the trainer's own is in use meanwhile
        self._host_copy = HostCopy()
        self._thread: threading.Thread | None = None
        self.last_step = 0
        """The newest step that `save` was called for."""

    def save(self, step: int, state: dict[str, Any], *, wait: bool = False) -> None:
        """Writes the checkpoint of `step`, in the background unless `wait` or the config says otherwise.

        One that cannot be written (a full disk) is a warning: what was there before stays, and training goes on.

        Args:
            state: what `load` gives back; JSON. `metrics` are the step's.
        """
        self.finish()
        self.last_step = step
        tensors = self._trainable.tensors(with_optimizer=self._settings.save_optimizer)
        tensors = self._host_copy.take(tensors)
        state = {**state, "step": step, "num_updates": self._trainable.num_updates, "num_ranks": dist.get_world_size()}
        state["base"] = self._trainable.base
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, state, random_states()), name="checkpoint", daemon=True
        )
        self._thread.start()
        if wait or not self._settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Until what is being written is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        self.finish()
        self._host_copy = HostCopy()

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any], randomness: dict[str, Any]) -> None:
        root, rank = self._run.checkpoints, dist.get_rank()
        temporary = store.temporary_path(root, step)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            files = {name: MOMENTS_FILE if name.startswith(MOMENTS) else WEIGHTS_FILE for name in tensors}
            writer = dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            write_json(temporary / f"rank_{rank}.json", randomness)
            mine = [temporary / f"rank_{rank}.json", *temporary.glob(f"shard-{rank + 1:05}-*")]
            if rank == 0:
                write_json(temporary / store.STATE, state)
                shutil.copyfile(self._run.config, temporary / store.CONFIG)
                mine += [temporary / store.STATE, temporary / store.CONFIG]
            entries, problem = store.describe(mine), None
        except (Exception, dcp.api.CheckpointException) as error:  # what a file system raises, on one rank or another
            entries, problem = {}, _root_cause(error)
            log.exception("the checkpoint of step %d", step)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (entries, problem), group=self._group)
        if rank == 0:
            self._seal(step, everyone)

    def _seal(self, step: int, everyone: list[tuple[dict[str, Any], str | None]]) -> None:
        root, settings = self._run.checkpoints, self._settings
        temporary = store.temporary_path(root, step)
        problems = [problem for _, problem in everyone if problem]
        try:
            if problems:
                raise DistillError(problems[0])
            store.seal(temporary, store.final_path(root, step), {k: v for part, _ in everyone for k, v in part.items()})
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


def load(path: Path, trainable: Trainable) -> dict[str, Any]:
    """Fills the student, its optimizer and schedule, and the random states; what `save` was given as state.

    A collective. The checkpoint may come from another number of ranks and another mesh; random states then stay as
    they are (what is sampled has seeds of its own).

    Raises:
        DistillError: the checkpoint's parameters are not the student's.
    """
    state = json.loads((path / store.STATE).read_text())
    reader = dcp.HuggingFaceStorageReader(str(path))
    with_optimizer = any(name.startswith(MOMENTS) for name in reader.read_metadata().state_dict_metadata)
    if with_optimizer:
        start_moments(trainable, num_updates=state["num_updates"])
    else:
        log.warning("%s has no optimizer state (checkpoint.save_optimizer=false): AdamW's moments start anew", path)
    group = dist.new_group(backend="gloo")
    try:
        dcp.load(trainable.tensors(with_optimizer=with_optimizer), storage_reader=reader, process_group=group)
    except (Exception, dcp.api.CheckpointException) as error:
        raise DistillError(f"{path}: does not fit this student: {_root_cause(error)}") from error
    dist.destroy_process_group(group)
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
