"""Rollouts become micro-batches: sequences laid end to end up to a token budget.

Where a response token stands at position s of the packed row, the hidden state that predicts it stands at s - 1: those
are the `rows` that reach the head; no other position's logits are ever computed.

Shape letters: T tokens of the packed row, N response tokens in it, K the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from distill_cli.types import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """One packed row and the teacher's scores at its response tokens."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each document."""
    document_bounds: tuple[int, ...]
    """0, then each document's end."""
    rows: torch.Tensor
    """int64 [N]: positions whose hidden state predicts a response token."""
    sampled_ids: torch.Tensor
    """int64 [N]: those response tokens."""
    sampler_logp: torch.Tensor
    """float32 [N]: their log-probability by the sampler."""
    topk_ids: torch.Tensor
    """int32 [N, K]"""
    topk_logp: torch.Tensor
    """float32 [N, K]"""
    sequences: tuple[int, ...] = ()
    """Which of the rollouts handed to `pack` the documents are, in order."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_response_tokens(self) -> int:
        return self.rows.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        return MicroBatch(**moved)


def pack(rollouts: Sequence[Rollout], *, max_tokens: int) -> list[MicroBatch]:
    """Scored rollouts as micro-batches of at most `max_tokens` tokens, by first-fit decreasing.

    A rollout longer than `max_tokens` has a micro-batch of its own. All rollouts carry the same k.
    """
    bins = first_fit_decreasing([len(rollout.token_ids) for rollout in rollouts], max_tokens)
    return [_micro_batch([rollouts[i] for i in members], tuple(members)) for members in bins]


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins whose sums stay within `capacity`, longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def empty_micro_batch(topk: int) -> MicroBatch:
    """One token and no loss: what a rank computes when others have more micro-batches than it has.

    FSDP's collectives must be entered by every rank as often.
    """
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        document_bounds=(0, 1),
        rows=none,
        sampled_ids=none,
        sampler_logp=torch.zeros(0),
        topk_ids=torch.zeros(0, topk, dtype=torch.int32),
        topk_logp=torch.zeros(0, topk),
    )


def _micro_batch(rollouts: Sequence[Rollout], members: tuple[int, ...]) -> MicroBatch:
    bounds, tokens, positions, rows = [0], [], [], []
    for rollout in rollouts:
        begin, ids = bounds[-1], rollout.token_ids
        first = begin + len(rollout.prompt.token_ids) - 1  # predicts the first response token
        tokens += ids
        positions.append(torch.arange(len(ids)))
        rows.append(torch.arange(first, first + len(rollout.sample.token_ids)))
        bounds.append(begin + len(ids))
    return MicroBatch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.cat(positions)[None],
        document_bounds=tuple(bounds),
        rows=torch.cat(rows),
        sampled_ids=torch.tensor([t for rollout in rollouts for t in rollout.sample.token_ids], dtype=torch.int64),
        sampler_logp=torch.tensor([x for rollout in rollouts for x in rollout.sample.logp], dtype=torch.float32),
        topk_ids=torch.cat([rollout.scores.topk_ids for rollout in rollouts]),
        topk_logp=torch.cat([rollout.scores.topk_logp for rollout in rollouts]),
        sequences=members,
    )
