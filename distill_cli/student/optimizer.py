"""AdamW, its learning-rate schedule, and one optimizer update over micro-batches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distill_cli.losses.linear_divergence import HeadOutput
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch
from distill_cli.student.model import Student

Schedule = Literal["constant", "cosine", "linear"]
TERMS: tuple[Literal["divergence", "advantage"], ...] = ("divergence", "advantage")
"""What the loss is a sum of; see `Student.term_alone`."""


@dataclass(frozen=True)
class StepResult:
    """Results of one optimizer update."""

    loss: float
    """Mean over the response tokens of the global batch."""
    grad_norm: float
    """Before clipping."""
    num_response_tokens: int
    """In the global batch."""
    outputs: list[HeadOutput]
    """One per micro-batch of this rank, in their order."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite: else the parameters were not updated."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def build_optimizer(
    student: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """Build AdamW over the trained parameters; matrices decay, vectors (norms, biases) do not."""
    params = [param for param in student.parameters() if param.requires_grad]
    matrices, vectors = ([param for param in params if (param.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": group, "weight_decay": weight_decay} for group in by_mesh(matrices)]
    groups += [{"params": group, "weight_decay": 0.0} for group in by_mesh(vectors)]  # none with adapters
    on_cpu = all(param.device.type == "cpu" for param in params)  # where torch's default goes parameter by parameter
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=on_cpu or None)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, kind: Schedule = "constant", warmup_updates: int = 10, num_updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the learning rate's schedule over a run of `num_updates` updates (`lr_factor`)."""
    factor = partial(lr_factor, kind=kind, warmup_updates=warmup_updates, num_updates=num_updates)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor(update: int, *, kind: Schedule, warmup_updates: int, num_updates: int) -> float:
    """Return the factor of the learning rate at `update`, counted from 0.

    It rises linearly to 1 at update `warmup_updates`; a cosine or linear schedule then falls to 0 at `num_updates`.
    """
    if update < warmup_updates:
        return (update + 1) / (warmup_updates + 1)
    progress = min(1.0, (update - warmup_updates) / max(1, num_updates - warmup_updates))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[kind]


def optimizer_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Sequence[MicroBatch],
    *,
    max_grad_norm: float,
    parallel: Parallel,
) -> StepResult:
    """Accumulate the gradient, clip it and update the parameters. A collective.

    If the loss or the gradient is not finite, parameters, moments and learning rate stay as they were.
    """
    result = accumulate_gradient(student, batches, max_grad_norm=max_grad_norm, parallel=parallel)
    if result.is_finite:
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def accumulate_gradient(
    student: Student, batches: Sequence[MicroBatch], *, max_grad_norm: float, parallel: Parallel
) -> StepResult:
    """Run forward and backward over this rank's micro-batches of one global batch, and clip. A collective.

    Every rank has the same number of micro-batches (`rollout.pack`), some possibly without loss.

    How the global batch is split into ranks and micro-batches changes neither loss nor gradient: each token's loss is
    divided by the token count of all of them, and gradients are summed. The loss of routers is apart: it compares the
    tokens of a micro-batch with each other.
    """
    total_tokens = count_response_tokens(batches, parallel=parallel)
    assert isinstance(student, FSDPModule)
    loss, outputs = torch.zeros((), device=parallel.device), []
    for number, batch in enumerate(batches):
        student.set_requires_gradient_sync(number == len(batches) - 1)
        batch_loss, output = student(batch.to(parallel.device), num_loss_tokens=total_tokens.clamp(min=1))
        batch_loss.backward()
        loss += output.loss.detach()
        outputs.append(output)
    parallel.all_sum(loss)
    norm = clip_gradient(student, max_norm=max_grad_norm)
    return StepResult(float(loss), norm, int(total_tokens), outputs)


def term_norms(
    student: Student, optimizer: torch.optim.Optimizer, batches: Sequence[MicroBatch], *, parallel: Parallel
) -> dict[str, float]:
    """Return the gradient's norm of each of the loss's terms alone, by its name. A collective.

    Each costs a forward and a backward pass; parameters and optimizer stay as they are.
    """
    norms = dict[str, float]()
    for term in TERMS:
        with student.term_alone(term):
            result = accumulate_gradient(student, batches, max_grad_norm=math.inf, parallel=parallel)
        norms[term] = result.grad_norm
        optimizer.zero_grad(set_to_none=True)
    return norms


def clip_gradient(student: nn.Module, *, max_norm: float) -> float:
    """Scale the gradient to at most `max_norm` and return its norm before. A collective."""
    squares, groups = [], by_mesh(param for param in student.parameters() if param.grad is not None)
    for params in groups:
        norm: Any = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        squares.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(squares)) if len(squares) > 1 else squares[0]
    for params in groups:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, total)
    return float(total)


def by_mesh(params: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return parameters by the mesh that they are laid out over: operators on several take no more than one."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for param in params:
        groups.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    return list(groups.values())


def count_response_tokens(batches: Sequence[MicroBatch], *, parallel: Parallel) -> torch.Tensor:
    """Count the global batch's response tokens over all ranks and micro-batches; scalar float. A collective."""
    num_tokens = sum(batch.num_response_tokens for batch in batches)
    return parallel.all_sum(torch.tensor(float(num_tokens), device=parallel.device))


class OptimizerOffload:
    """Keep an optimizer's state on another device, except inside its own step.

    Parameters and gradients do not move. A checkpoint may read the resting state; after filling the state by other
    means than `load_state_dict`, call `to_rest`. Step counts do not move: AdamW keeps them on the CPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rest: torch.device, work: torch.device) -> None:
        """Keep the state on `work` during a step, and on `rest` (pinned, if `work` is a GPU) otherwise."""
        self.optimizer, self.rest, self.work = optimizer, rest, work
        optimizer.register_step_pre_hook(lambda *_: self.move(work))
        optimizer.register_step_post_hook(lambda *_: self.to_rest())
        optimizer.register_load_state_dict_post_hook(lambda *_: self.to_rest())

    def to_rest(self) -> None:
        """Move the state to its resting device."""
        self.move(self.rest)

    def move(self, device: torch.device) -> None:
        """Move every parameter's moments to `device`; the copies overlap."""
        pinned = device == self.rest and self.work.type == "cuda"
        for param, state in self.optimizer.state.items():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor) or value.shape != param.shape:
                    continue
                local = value._local_tensor if isinstance(value, DTensor) else value
                moved = torch.empty_like(local, device=device, pin_memory=pinned).copy_(local, non_blocking=True)
                if isinstance(value, DTensor):  # from_local would bring it back to the mesh's device
                    value._local_tensor = moved
                else:
                    state[name] = moved
        if self.work.type == "cuda":
            torch.cuda.synchronize(self.work)  # before the sources are freed and the copies read
