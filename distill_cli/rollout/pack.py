"""Rollouts become micro-batches: planned from lengths alone, the same plan on every rank, then laid out.

A row is sequences laid end to end, up to a token budget; none sees another. Without packing they have similar lengths
and each is padded to the same one. Every rank runs as many micro-batches, since FSDP's collectives must be entered by
all as often, and those that run at the same time have about as many tokens, since the slowest holds up the others.

Where a response token stands at position s of the packed row, the hidden state that predicts it stands at s - 1: those
are the `rows` that reach the head; no other position's logits are ever computed. An environment's observations between
turns are read, and have no rows: nothing is learned from what the student did not write.

Shape letters: T tokens of the packed row, N response tokens in it, K the teacher's top-k.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from distill_cli.parallel.context import Documents
from distill_cli.parallel.mesh import Parallel
from distill_cli.types import Rollout, Sample


@dataclass(frozen=True)
class MicroBatch:
    """One packed row and the teacher's scores at its response tokens."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each document."""
    documents: Documents
    """Where each sequence ends; the padding is a document too."""
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
    origins: torch.Tensor
    """int64 [N, 2]: which of the planned sequences, and which token of its response."""
    sequences: tuple[int, ...] = ()
    """Which of the planned sequences the documents are, in order."""

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

    def context_share(self, parallel: Parallel) -> MicroBatch:
        """The part of the row that is this rank's among the context-parallel ones; the row itself for a single one."""
        size, rank = parallel.context.size(), parallel.context.get_local_rank()
        if size == 1:
            return self
        documents = replace(self.documents, rank=rank, size=size, group=parallel.context.get_group())
        place = torch.full((self.num_tokens,), -1)
        place[documents.take(torch.arange(self.num_tokens), 0)] = torch.arange(self.num_tokens // size)
        mine = (place[self.rows] >= 0).nonzero()[:, 0]
        return replace(
            self,
            input_ids=documents.take(self.input_ids, 1),
            position_ids=documents.take(self.position_ids, 1),
            documents=documents,
            rows=place[self.rows][mine],
            sampled_ids=self.sampled_ids[mine],
            sampler_logp=self.sampler_logp[mine],
            topk_ids=self.topk_ids[mine],
            topk_logp=self.topk_logp[mine],
            origins=self.origins[mine],
        )


@dataclass(frozen=True)
class RowPlan:
    """One micro-batch: which sequences, each taking how many tokens of the row, and the row's length."""

    members: tuple[int, ...]
    places: tuple[int, ...]
    """Tokens that each member takes: its own, or more where it is padded."""
    length: int


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut into micro-batches over the ranks that share its sequences."""

    rows: tuple[tuple[RowPlan, ...], ...]
    """Of each rank, as many for all of them; the i-th of all run at the same time."""
    num_tokens: int
    """Of all sequences."""

    @property
    def computed_tokens(self) -> int:
        """What the ranks could have computed while the slowest of them computed."""
        rounds = zip(*self.rows, strict=True)
        return sum(max(row.length for row in one_round) for one_round in rounds) * len(self.rows)

    def members_of(self, rank: int) -> list[int]:
        return [member for row in self.rows[rank] for member in row.members]


Plans = list[tuple[Sequence[Rollout], BatchPlan]]
"""A step's global batches, and how each is cut up."""


def plan_batch(
    lengths: Sequence[int], *, num_ranks: int, max_tokens: int, packing: bool = True, multiple: int = 1
) -> BatchPlan:
    """Cuts sequences of these lengths into micro-batches of at most `max_tokens` tokens.

    A sequence longer than `max_tokens` has a micro-batch of its own. Rows are padded to a multiple of `multiple`.
    """
    cut = _packed_rows if packing else _padded_rows
    rows = cut(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    plans = [_row_plan(members, place, lengths, multiple) for members, place in rows]
    plans.sort(key=lambda row: -row.length)  # those of a round are neighbours
    plans += [_row_plan((), None, lengths, multiple)] * (-len(plans) % num_ranks)
    return BatchPlan(tuple(tuple(plans[rank::num_ranks]) for rank in range(num_ranks)), sum(lengths))


def _packed_rows(lengths: Sequence[int], *, num_ranks: int, max_tokens: int) -> list[tuple[tuple[int, ...], None]]:
    """As few rounds as the budget allows, and sequences spread evenly over their rows, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    num_rows = -(-max(-(-sum(lengths) // max_tokens), 1) // num_ranks) * num_ranks
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        heap = [(0, row) for row in range(num_rows)]
        for index in order:
            filled, row = heapq.heappop(heap)
            rows[row].append(index)
            heapq.heappush(heap, (filled + lengths[index], row))
        if all(len(row) <= 1 or sum(lengths[i] for i in row) <= max_tokens for row in rows):
            return [(tuple(row), None) for row in rows if row]
        num_rows += num_ranks


def _padded_rows(lengths: Sequence[int], *, num_ranks: int, max_tokens: int) -> list[tuple[tuple[int, ...], int]]:
    """Neighbours in length share a row; all are padded to the bucket of the longest."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[tuple[tuple[int, ...], int]] = []
    while order:
        place = bucket(lengths[order[0]])
        size = max(1, max_tokens // place)
        taken, order = order[: size * num_ranks], order[size * num_ranks :]
        rows += [(tuple(taken[rank::num_ranks]), place) for rank in range(min(num_ranks, len(taken)))]
    return rows


def bucket(length: int) -> int:
    """The length that padding goes up to: the next of four to an octave, so that there are few."""
    step = max(1, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def _row_plan(members: tuple[int, ...], place: int | None, lengths: Sequence[int], multiple: int) -> RowPlan:
    places = tuple(place or lengths[member] for member in members)
    return RowPlan(members, places, max(-(-sum(places) // multiple), 1) * multiple)


def lay_out(plan: RowPlan, rollouts: Sequence[Rollout], *, topk: int) -> MicroBatch:
    """The planned row. `rollouts` are all that were planned; its members carry their scores.

    A row without members has no loss: what a rank computes while others have more than it has.
    """
    bounds, rows, origins = [0], [], []
    tokens = torch.zeros(1, plan.length, dtype=torch.int64)
    positions = torch.zeros(1, plan.length, dtype=torch.int64)
    members = [rollouts[member] for member in plan.members]
    for member, rollout, place in zip(plan.members, members, plan.places, strict=True):
        begin, ids = bounds[-1], rollout.token_ids
        first = begin + len(rollout.prompt.token_ids) - 1  # predicts the first response token
        tokens[0, begin : begin + len(ids)] = torch.tensor(ids)
        positions[0, begin : begin + place] = torch.arange(place)
        tokens_of = trained_tokens(rollout.sample)
        rows.append(first + tokens_of)
        origins.append(torch.stack([torch.full_like(tokens_of, member), tokens_of], dim=1))
        bounds.append(begin + place)
    if bounds[-1] < plan.length:
        positions[0, bounds[-1] :] = torch.arange(plan.length - bounds[-1])
        bounds.append(plan.length)
    none = torch.zeros(0, dtype=torch.int64)
    trained = [(rollout, trained_tokens(rollout.sample)) for rollout in members]
    return MicroBatch(
        input_ids=tokens,
        position_ids=positions,
        documents=Documents(tuple(bounds)),
        rows=torch.cat([none, *rows]),
        sampled_ids=torch.cat([none, *(torch.tensor(r.sample.token_ids)[of] for r, of in trained)]),
        sampler_logp=torch.cat([torch.zeros(0), *(torch.tensor(r.sample.logp)[of] for r, of in trained)]),
        topk_ids=torch.cat([torch.zeros(0, topk, dtype=torch.int32), *(r.scores.topk_ids[of] for r, of in trained)]),
        topk_logp=torch.cat([torch.zeros(0, topk), *(r.scores.topk_logp[of] for r, of in trained)]),
        origins=torch.cat([none.view(0, 2), *origins]),
        sequences=plan.members,
    )


def trained_tokens(sample: Sample) -> torch.Tensor:
    """int64 [N]: the places in a response of the tokens that the student wrote, observations left out."""
    if sample.trained is None:
        return torch.arange(len(sample.token_ids))
    return torch.tensor(sample.trained).nonzero()[:, 0]


def micro_batches(plan: BatchPlan, rollouts: Sequence[Rollout], *, topk: int, parallel: Parallel) -> list[MicroBatch]:
    """This rank's part of a planned global batch, in the order in which all ranks run theirs."""
    mine = plan.rows[parallel.data_rank]
    return [lay_out(row, rollouts, topk=topk).context_share(parallel) for row in mine]
