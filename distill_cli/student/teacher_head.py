"""The teachers' heads beside the student's: frozen, and cut over the same ranks.

A rank needs, of a teacher's head, the rows of the ids that its shard of the student's has (all of them without tensor
parallelism), as far as the shared vocabulary reaches. Those rows are cut over the ranks of FSDP's shard axis, as the
student's parameters are, and gathered for each micro-batch.

Shape letters: V ids of this tensor rank's shard of the student's head, N tokens, K ids of each, H the teacher's hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from distill_cli.losses.head import Head, logit_dtype
from distill_cli.losses.head import Shard as VocabularyShard
from distill_cli.losses.logit_transform import LogitTransform
from distill_cli.losses.own_logits import OwnHead
from distill_cli.losses.teacher_chunk import TeacherChunk, TeacherHidden
from distill_cli.parallel.mesh import Parallel
from distill_cli.types import ModelHead

ReadRows = Callable[[tuple[int, int]], ModelHead]
"""Returns the rows of a teacher's head from one id up to another, fewer where it has fewer (`Teacher.head`)."""


@dataclass
class TeacherHeads:
    """The heads of a run's teachers, by index."""

    parallel: Parallel
    vocab_size: int
    """First id that no teacher scores."""
    shard_size: int
    """V"""
    firsts: dict[int, torch.Tensor] = field(default_factory=dict)
    """By index of the teachers with a tokenizer of their own: by id of theirs the student's first token, below 0 if
    there is none; int64."""
    _parts: dict[int, tuple[DTensor, torch.Tensor | None, LogitTransform]] = field(default_factory=dict)

    def rows(self, index: int) -> tuple[int, int]:
        """Return a teacher's ids that this rank has: those of its shard of the student's head, as far as teachers score
        them; of a teacher with a tokenizer of its own an even part."""
        size, last = self._size(index), len(self.firsts[index]) if index in self.firsts else self.vocab_size
        first = self.parallel.tensor.get_local_rank() * size
        return first, max(first, min(first + size, last))

    def own(self, index: int) -> OwnHead | None:
        """Return what this rank's ids of a teacher are to the student; None if they are the student's."""
        if index not in self.firsts:
            return None
        first, last = self.rows(index)
        return OwnHead(self.firsts[index][first:last].to(self.parallel.device), self._size(index))

    def _size(self, index: int) -> int:
        """Return the ids of a rank's shard of a teacher's vocabulary."""
        if index not in self.firsts:
            return self.shard_size
        return -(-len(self.firsts[index]) // self.parallel.tensor.size())

    def read(self, index: int, read_rows: ReadRows) -> None:
        """Take a teacher's head, or take it anew. A collective: the ranks that share an engine read together."""
        mesh, (first, last), device = self.parallel.fsdp, self.rows(index), self.parallel.device
        shard = mesh.ndim - 1  # behind the axis of copies, if there is one
        size = -(-(last - first) // mesh.size(shard))  # as DTensor cuts: the last ranks may have fewer
        begin = min(first + mesh.get_local_rank(shard) * size, last)
        head = read_rows((begin, min(begin + size, last)))
        # Every rank has the bias of its whole shard: it is small.
        bias = None if head.bias is None else read_rows((first, last)).bias
        width = head.weight.shape[1]
        weight = DTensor.from_local(
            head.weight.to(device),
            mesh,
            [*[Replicate()] * shard, Shard(0)],
            run_check=False,
            shape=torch.Size([last - first, width]),
            stride=(width, 1),
        )
        transform = LogitTransform(head.scale, head.soft_cap)
        self._parts[index] = weight, None if bias is None else bias.to(device), transform

    def gather(self) -> dict[int, Head]:
        """Return the heads, as far as this rank's shard reaches. A collective."""
        return {index: self._whole(index) for index in self._parts}

    def logp_at(self, index: int, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, *, temperature: float) -> torch.Tensor:
        """Return the log-probabilities of ids by a head and hidden states, computed as in training: float32 [N, K].

        A collective; ranks of the tensor axis call it with the same tokens.
        """
        head, group = self._whole(index), self.parallel.tensor.get_group() if self.parallel.tensor.size() > 1 else None
        hidden_NH = hidden_NH.to(head.weight_VH)
        size = self._size(index)
        buffer_NV, scratch_NV = torch.empty(
            2, len(hidden_NH), size, dtype=logit_dtype(hidden_NH), device=hidden_NH.device
        )
        chunk = TeacherChunk(
            TeacherHidden(hidden_NH, head, size * self.parallel.tensor.size(), "teacher", ids_NK.shape[1]),
            head.operands(hidden_NH),
            slice(None),
            buffer_nV=buffer_NV,
            scratch_nV=scratch_NV,
            shard=VocabularyShard(size, group, temperature),
            merged_eos_ids=(),
        )
        return chunk.logp_at(ids_NK.to(hidden_NH.device))

    def _whole(self, index: int) -> Head:
        weight, bias, transform = self._parts[index]
        return Head(weight.full_tensor(), bias, transform)
