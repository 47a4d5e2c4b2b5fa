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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from distill_cli.parallel.context import Documents
from distill_cli.parallel.mesh import Parallel
from distill_cli.types import Rollout, Sample, TeacherScores


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
    """float32 [N]: their log-probability by the sampler; 0 if unknown."""
    has_sampler_logp: torch.Tensor
    """bool [N]: whether it is known, as it is of what the student wrote."""
    scores: TeacherScores
    """The teacher's view of them, [N] rows."""
    origins: torch.Tensor
    """int64 [N, 2]: which of the step's sequences, and which token of its response."""

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
        movable = {name: value for name, value in values.items() if isinstance(value, torch.Tensor | TeacherScores)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in movable.items()})

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
            has_sampler_logp=self.has_sampler_logp[mine],
            scores=self.scores.take(mine),
            origins=self.origins[mine],
        )


@dataclass(frozen=True)
class RowPlan:
    """One micro-batch: which of the step's sequences, each taking how many tokens of the row, and the row's length."""

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
        """Token slots of the schedule: rounds x ranks x the longest row of the round."""
        rounds = zip(*self.rows, strict=True)
        return sum(max(row.length for row in one_round) for one_round in rounds) * len(self.rows)

    def members_of(self, rank: int) -> list[int]:
        return [member for row in self.rows[rank] for member in row.members]

    @property
    def members(self) -> list[int]:
        """The sequences of the global batch, in the step's order."""
        return sorted(member for rank in range(len(self.rows)) for member in self.members_of(rank))


@dataclass(frozen=True)
class Planner:
    """How a step's sequences are cut up; the same on every rank."""

    global_batch_size: int
    """Sequences to an optimizer update, over all ranks."""
    rank: int
    """This one among those that share the sequences."""
    cut: Callable[..., BatchPlan]
    """`plan_batch`, with all that is the same for every global batch."""

    def plan(self, rollouts: Sequence[Rollout]) -> list[BatchPlan]:
        """Plan each global batch; these are the same sequences on any number of ranks."""
        lengths, size = [len(rollout.token_ids) for rollout in rollouts], self.global_batch_size
        return [self.cut(lengths[first : first + size], first=first) for first in range(0, len(lengths), size)]

    def local_places(self, plans: Sequence[BatchPlan]) -> list[int]:
        """Return which of the step's sequences this rank trains on, in the order in which it does."""
        return [place for plan in plans for place in plan.members_of(self.rank)]


def plan_batch(
    lengths: Sequence[int], *, num_ranks: int, max_tokens: int, packing: bool = True, multiple: int = 1, first: int = 0
) -> BatchPlan:
    """Cut sequences of these lengths into micro-batches of at most `max_tokens` tokens.

    A sequence longer than `max_tokens` has a micro-batch of its own. Rows are padded to a multiple of `multiple`.

    Args:
        first: which of the step's sequences `lengths` begins with.
    """
    cut = _packed_rows if packing else _padded_rows
    rows = cut(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    plans = [_row_plan(members, place, lengths, multiple, first) for members, place in rows]
    plans.sort(key=lambda row: -row.length)  # those of a round are neighbours
    plans += [_row_plan((), None, lengths, multiple, first)] * (-len(plans) % num_ranks)
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
    """Neighbours in length share a row; all are padded to the padded length of the longest."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[tuple[tuple[int, ...], int]] = []
    while order:
        place = padded_length(lengths[order[0]])
        size = max(1, max_tokens // place)
        taken, order = order[: size * num_ranks], order[size * num_ranks :]
        rows += [(tuple(taken[rank::num_ranks]), place) for rank in range(min(num_ranks, len(taken)))]
    return rows


def padded_length(length: int) -> int:
    """The length that padding goes up to: the next of four to an octave, so that there are few."""
    step = max(1, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def _row_plan(
    members: tuple[int, ...], place: int | None, lengths: Sequence[int], multiple: int, first: int
) -> RowPlan:
    places = tuple(place or lengths[member] for member in members)
    length = max(-(-sum(places) // multiple), 1) * multiple
    return RowPlan(tuple(first + member for member in members), places, length)


def lay_out(plan: RowPlan, rollouts: Sequence[Rollout], scores: Mapping[int, TeacherScores]) -> MicroBatch:
    """Lay out a planned row. A row without members has no loss: what a rank computes while others have more.

    Args:
        rollouts: all of the step.
        scores: by place in `rollouts`, at least those of the row's members.
    """
    bounds, none = [0], torch.zeros(0, dtype=torch.int64)
    rows, origins, sampled, sampler_logp, has_logp = [none], [none.view(0, 2)], [none], [none.float()], [none.bool()]
    taken = []
    tokens = torch.zeros(1, plan.length, dtype=torch.int64)
    positions = torch.zeros(1, plan.length, dtype=torch.int64)
    for member, place in zip(plan.members, plan.places, strict=True):
        rollout = rollouts[member]
        begin, ids = bounds[-1], rollout.token_ids
        first = begin + len(rollout.prompt.token_ids) - 1  # predicts the first response token
        tokens[0, begin : begin + len(ids)] = torch.tensor(ids)
        positions[0, begin : begin + place] = torch.arange(place)
        trained = trained_tokens(rollout.sample)
        rows.append(first + trained)
        origins.append(torch.stack([torch.full_like(trained, member), trained], dim=1))
        sampled.append(torch.tensor(rollout.sample.token_ids)[trained])
        logp = rollout.sample.logp
        sampler_logp.append(torch.zeros(len(trained)) if logp is None else torch.tensor(logp)[trained])
        has_logp.append(torch.full((len(trained),), logp is not None))
        taken.append(scores[member].take(trained))
        bounds.append(begin + place)
    if bounds[-1] < plan.length:
        positions[0, bounds[-1] :] = torch.arange(plan.length - bounds[-1])
        bounds.append(plan.length)
    return MicroBatch(
        input_ids=tokens,
        position_ids=positions,
        documents=Documents(tuple(bounds)),
        rows=torch.cat(rows),
        sampled_ids=torch.cat(sampled),
        sampler_logp=torch.cat(sampler_logp),
        has_sampler_logp=torch.cat(has_logp),
        scores=TeacherScores.cat(taken) if taken else TeacherScores.empty(),
        origins=torch.cat(origins),
    )


def trained_tokens(sample: Sample) -> torch.Tensor:
    """int64 [N]: the places in a response of the tokens that the student wrote, observations left out."""
    if sample.trained is None:
        return torch.arange(len(sample.token_ids))
    return torch.tensor(sample.trained).nonzero()[:, 0]


def micro_batches(
    plan: BatchPlan, rollouts: Sequence[Rollout], scores: Mapping[int, TeacherScores], *, parallel: Parallel
) -> list[MicroBatch]:
    """Lay out this rank's part of a planned global batch, in the order in which all ranks run theirs."""
    mine = plan.rows[parallel.data_rank]
    return [lay_out(row, rollouts, scores).context_share(parallel) for row in mine]
