"""A copy of the student's trained parameters that follows them: the weights of a moving teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

PREFIX = "teacher_copy"
"""The names of copies in a checkpoint begin with it."""


class MovingCopy:
    """Copies of the trained parameters, sharded as these are.

    With `ema` each copy becomes ema * copy + (1 - ema) * parameter after every training step; else it becomes the
    parameter after every `refresh` steps.
    """

    def __init__(self, model: nn.Module, *, ema: float | None = None, refresh: int = 1, number: int = 0) -> None:
        """Copy the parameters as they are.

        Args:
            number: tells several copies of one model apart.
        """
        self._params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._ema, self._refresh, self._prefix = ema, refresh, f"{PREFIX}_{number}"
        self._copies = {name: param.detach().clone() for name, param in self._params.items()}
        self.moves = 0
        """How often the copies have changed; a resumed run begins with 1."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live copies, by their names in a checkpoint."""
        return {f"{self._prefix}.{name}": copy for name, copy in self._copies.items()}

    def loaded(self) -> None:
        """Note that the copies were read from a checkpoint."""
        self.moves = max(self.moves, 1)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Follow the parameters after a training step, counted from 1."""
        if self._ema is None and step % self._refresh:
            return
        for name, copy in self._copies.items():
            mine, theirs = _local(copy), _local(self._params[name])
            mine.copy_(theirs) if self._ema is None else mine.lerp_(theirs, 1 - self._ema)
        self.moves += 1

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Put the copies into the model within the block. Its parameters may not be gathered meanwhile."""
        kept = {name: _local(param).clone() for name, param in self._params.items()}
        for name, param in self._params.items():
            _local(param).copy_(_local(self._copies[name]))
        try:
            yield
        finally:
            for name, param in self._params.items():
                _local(param).copy_(kept[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, which shares its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
