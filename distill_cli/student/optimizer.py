"""AdamW, its schedule, and one optimizer step over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from distill_cli.config.schema import Schedule, TrainConfig
from distill_cli.losses.linear_topk import HeadOutput
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch
from distill_cli.student.model import Student


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    loss: float
    """Of the global batch: the mean over its response tokens."""
    grad_norm: float
    """Before clipping."""
    num_response_tokens: int
    """Of the global batch."""
    outputs: list[HeadOutput]
    """Of this rank's own micro-batches, in their order."""

    @property
    def is_finite(self) -> bool:
        """Whether the parameters were updated: where the loss or its gradient is not finite, they are not."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def build_optimizer(student: Student, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    params = [param for param in student.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},  # none where adapters are
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=tuple(train.betas), eps=train.eps)


def build_schedule(
    optimizer: torch.optim.Optimizer, train: TrainConfig, *, num_updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over `num_updates` optimizer updates."""

    def factor(update: int) -> float:
        return lr_factor(update, train=train, num_updates=num_updates)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor(update: int, *, train: TrainConfig, num_updates: int) -> float:
    """Return what `train.lr` is multiplied by at an optimizer update, counted from 0.

    It rises linearly to 1 at update `warmup_updates` and, if the schedule falls, reaches 0 at update `num_updates`.
    """
    if update < train.warmup_updates:
        return (update + 1) / (train.warmup_updates + 1)
    progress = min(1.0, (update - train.warmup_updates) / max(1, num_updates - train.warmup_updates))
    match train.schedule:
        case Schedule.constant:
            return 1.0
        case Schedule.linear:
            return 1.0 - progress
        case Schedule.cosine:
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def optimizer_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Sequence[MicroBatch],
    *,
    max_grad_norm: float,
    parallel: Parallel,
) -> StepResult:
    """`accumulate_gradient`, clip, step. A collective.

    Where the loss or the gradient is not finite, parameters, moments and learning rate stay as they were.
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
    """Forward and backward over this rank's micro-batches of one global batch; the gradient, clipped. A collective.

    Every rank has as many micro-batches (`rollout.pack`), some of them perhaps without loss.

    How the global batch was cut into ranks and micro-batches changes neither loss nor gradient: each token's loss is
    divided by the token count of all of them, and gradients are summed.
    """
    total_tokens = count_response_tokens(batches, parallel=parallel)
    loss, outputs = torch.zeros((), device=parallel.device), []
    for number, batch in enumerate(batches):
        student.set_requires_gradient_sync(number == len(batches) - 1)
        batch_loss, output = student(batch.to(parallel.device), num_loss_tokens=total_tokens.clamp(min=1))
        batch_loss.backward()
        loss += batch_loss.detach()
        outputs.append(output)
    parallel.all_sum(loss)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm).full_tensor()
    return StepResult(
        loss=float(loss),
        grad_norm=float(norm),
        num_response_tokens=int(total_tokens),
        outputs=outputs,
    )


def count_response_tokens(batches: Sequence[MicroBatch], *, parallel: Parallel) -> torch.Tensor:
    """Scalar float: of the global batch, over all ranks and micro-batches. A collective."""
    num_tokens = sum(batch.num_response_tokens for batch in batches)
    return parallel.all_sum(torch.tensor(float(num_tokens), device=parallel.device))


class OptimizerOffload:
    """Keeps an optimizer's state on another device, except inside its own step.

    Parameters and gradients stay where they are. A checkpoint may read the state where it rests; whoever fills it in
    otherwise than by `load_state_dict` calls `to_rest`. Step counts stay: AdamW keeps them on the CPU itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rest: torch.device, work: torch.device) -> None:
        """State is on `work` during a step, and on `rest` (pinned, where that is the host of a GPU) otherwise."""
        self.optimizer, self.rest, self.work = optimizer, rest, work
        optimizer.register_step_pre_hook(lambda *_: self.move(work))
        optimizer.register_step_post_hook(lambda *_: self.to_rest())
        optimizer.register_load_state_dict_post_hook(lambda *_: self.to_rest())

    def to_rest(self) -> None:
        self.move(self.rest)

    def move(self, device: torch.device) -> None:
        """Every parameter's moments to `device`, all copies under way at once."""
        for param, state in self.optimizer.state.items():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor) or value.shape != param.shape:
                    continue
                if isinstance(value, DTensor):  # from_local would bring it back to the mesh's device
                    value._local_tensor = self._copy(value._local_tensor, device)
                else:
                    state[name] = self._copy(value, device)
        if self.work.type == "cuda":
            torch.cuda.synchronize(self.work)  # before the sources are given back, and the copies read

    def _copy(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        pinned = device == self.rest and self.work.type == "cuda"
        return torch.empty_like(value, device=device, pin_memory=pinned).copy_(value, non_blocking=True)
