"""Pack rollouts into micro-batches: plan from lengths alone, with the same plan on every rank, then lay out tensors.

A row is sequences laid end to end, up to a token budget; none attends to another. Without packing, sequences of similar
length share a micro-batch and are padded to one length: rows of one sequence each, which layers whose state would cross
from one sequence into the next need (or, among context-parallel ranks, one row of them). All ranks run the same number
of micro-batches, since FSDP's collectives need all of them, and micro-batches that run at the same time have about the
same number of tokens, since the slowest rank delays the others.

The hidden state at position s - 1 of the packed row predicts the response token at position s. Only these positions,
`rows`, reach the head; other logits are never computed. Observations of an environment are read but have no rows: the
student does not learn from tokens that it did not write.

Shape letters: T tokens of the packed row, N response tokens in it, K the teacher's top-k.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from distill_cli.parallel.context import Documents
from distill_cli.parallel.mesh import Parallel
from distill_cli.types import Rollout, Sample, TeacherScores

Rows = list[tuple[list[int], int | None]]
"""Indices of the sequences of each row, and the length that each sequence is padded to; None is its own."""


@dataclass(frozen=True)
class MicroBatch:
    """One packed row and the teacher's scores of its response tokens."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each document."""
    is_real: torch.Tensor
    """bool [1, T]: False for padding."""
    documents: Documents
    """The end of each sequence; the padding is a document too."""
    scores: TeacherScores
    """The teacher's scores of the response tokens, N rows."""
    rows: torch.Tensor
    """int64 [N]: positions whose hidden states predict response tokens."""
    sampled_ids: torch.Tensor
    """int64 [N]: the response tokens."""
    sampler_logp: torch.Tensor
    """float32 [N]: the sampler's log-probabilities of the response tokens; 0 if unknown."""
    has_sampler_logp: torch.Tensor
    """bool [N]: True if known, as for tokens that the student wrote."""
    origins: torch.Tensor
    """int64 [N, 2]: place of the sequence in the step, and of the token in the sequence's response."""
    teachers: torch.Tensor
    """int64 [N]: the set of the token's teachers (`Prompt.teachers`)."""
    trained_places: torch.Tensor
    """int64 [N, 2]: index of the token among those of its response that are trained, and their number up to now."""
    advantages: torch.Tensor
    """float32 [N]: of rewards and penalties (`rollout.advantages`); 0 without them."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def num_response_tokens(self) -> int:
        """N."""
        return self.rows.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on `device`."""
        if device.type == "cpu":
            return self
        kept: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "documents"}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in kept.items()})

    def context_share(self, parallel: Parallel) -> MicroBatch:
        """Return this rank's part of the row among the context-parallel ranks; the row itself if there is only one."""
        size, rank = parallel.context.size(), parallel.context.get_local_rank()
        if size == 1:
            return self
        documents = replace(self.documents, rank=rank, size=size, group=parallel.context.get_group())
        place = torch.full((self.num_tokens,), -1)
        place[documents.take(torch.arange(self.num_tokens), 0)] = torch.arange(self.num_tokens // size)
        mine = (place[self.rows] >= 0).nonzero()[:, 0]
        per_token = ("sampled_ids", "sampler_logp", "has_sampler_logp", "origins", "teachers", "trained_places")
        return replace(
            self,
            input_ids=documents.take(self.input_ids, 1),
            position_ids=documents.take(self.position_ids, 1),
            is_real=documents.take(self.is_real, 1),
            documents=documents,
            rows=place[self.rows][mine],
            scores=self.scores.take(mine),
            **{name: getattr(self, name)[mine] for name in (*per_token, "advantages")},
        )


@dataclass(frozen=True)
class RowPlan:
    """One micro-batch, planned."""

    members: tuple[int, ...]
    """Places of its sequences in the step."""
    places: tuple[int, ...]
    """Tokens of the row that each member takes: its own and its padding."""
    length: int
    """Tokens of the row."""
    is_rows: bool = False
    """Each member is a row of its own, and `places` are all equal."""


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is split into micro-batches over the ranks that share its sequences."""

    rows: tuple[tuple[RowPlan, ...], ...]
    """By rank, equally many each; the i-th rows of all ranks run at the same time."""
    num_tokens: int
    """Tokens of all sequences."""

    @property
    def computed_tokens(self) -> int:
        """Token slots of the schedule: rounds x ranks x the longest row of the round."""
        return sum(max(row.length for row in rows) for rows in zip(*self.rows, strict=True)) * len(self.rows)

    def members_of(self, rank: int) -> list[int]:
        """Return the sequences of one rank, in the order in which it trains on them."""
        return [member for row in self.rows[rank] for member in row.members]

    @property
    def members(self) -> list[int]:
        """The sequences of the global batch, in the step's order."""
        return sorted(member for rows in self.rows for row in rows for member in row.members)


@dataclass(frozen=True)
class Planner:
    """Split a step's sequences into global batches and plan each, with the same result on every rank."""

    global_batch_size: int
    """Sequences per optimizer update, over all ranks."""
    rank: int
    """This rank's index among those that share the sequences."""
    cut: Callable[..., BatchPlan]
    """`plan_batch` with the arguments that all global batches share."""

    def plan(self, rollouts: Sequence[Rollout], slots: Sequence[int] | None = None) -> list[BatchPlan]:
        """Plan each global batch; its sequences do not depend on the number of ranks.

        Args:
            slots: rising; a global batch has the sequences of `global_batch_size` slots. None is one sequence a slot.
        """
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        pairs = enumerate(range(len(lengths)) if slots is None else slots)
        batches = groupby(pairs, key=lambda pair: pair[1] // self.global_batch_size)
        places = [[place for place, _ in batch] for _, batch in batches]
        return [self.cut([lengths[place] for place in own], first=own[0]) for own in places]

    def local_places(self, plans: Sequence[BatchPlan]) -> list[int]:
        """Return the places of the sequences that this rank trains on, in the order of training."""
        return [place for plan in plans for place in plan.members_of(self.rank)]


def plan_batch(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    max_tokens: int,
    packing: bool = True,
    one_row: bool = False,
    multiple: int = 1,
    first: int = 0,
) -> BatchPlan:
    """Split sequences of these lengths into micro-batches of at most `max_tokens` tokens.

    A sequence longer than `max_tokens` has a micro-batch of its own. Rows are padded to a multiple of `multiple`.

    Args:
        packing: lay sequences end to end; else pad those of a micro-batch to one length, each a row of its own.
        one_row: lay padded sequences end to end too, for context-parallel ranks, which share a row.
        first: place in the step of the sequence that `lengths` begins with.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    split = _packed_rows if packing else partial(_padded_rows, multiple=multiple)
    is_rows, plans = not packing and not one_row, []
    for row, padded in split(longest_first, lengths, num_ranks=num_ranks, max_tokens=max_tokens):
        places = tuple(padded or lengths[member] for member in row)
        length = max(-(-sum(places) // multiple), 1) * multiple
        plans.append(RowPlan(tuple(first + member for member in row), places, length, is_rows))
    plans.sort(key=lambda plan: -plan.length)  # rows of about equal length run at the same time
    plans += [RowPlan((), (), multiple, is_rows)] * (-len(plans) % num_ranks)
    return BatchPlan(tuple(tuple(plans[rank::num_ranks]) for rank in range(num_ranks)), sum(lengths))


def _packed_rows(order: list[int], lengths: Sequence[int], *, num_ranks: int, max_tokens: int) -> Rows:
    """Return as few rows as the budget allows, a multiple of `num_ranks`, with sequences spread evenly over them."""
    num_rows = -(-max(-(-sum(lengths) // max_tokens), 1) // num_ranks) * num_ranks
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        heap = [(0, row) for row in range(num_rows)]
        for index in order:
            filled, row = heapq.heappop(heap)
            rows[row].append(index)
            heapq.heappush(heap, (filled + lengths[index], row))
        if all(len(row) <= 1 or sum(lengths[i] for i in row) <= max_tokens for row in rows):
            return [(row, None) for row in rows if row]
        num_rows += num_ranks


def _padded_rows(order: list[int], lengths: Sequence[int], *, num_ranks: int, max_tokens: int, multiple: int) -> Rows:
    """Return rows of sequences of similar length, each padded to the padded length of the longest."""
    rows: Rows = []
    while order:
        padded = -(-padded_length(lengths[order[0]]) // multiple) * multiple
        size = max(1, max_tokens // padded) * num_ranks
        taken, order = order[:size], order[size:]
        rows += [(taken[rank::num_ranks], padded) for rank in range(min(num_ranks, len(taken)))]
    return rows


def padded_length(length: int) -> int:
    """Return the next of four lengths per octave, so that padding produces few different lengths."""
    step = max(1, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def lay_out(
    plan: RowPlan,
    rollouts: Sequence[Rollout],
    scores: Mapping[int, TeacherScores],
    advantages: Mapping[int, torch.Tensor] | None = None,
) -> MicroBatch:
    """Lay out a planned row. A row without members has no loss; a rank computes it while others have more rows.

    Args:
        rollouts: all of the step.
        scores: by place in `rollouts`, at least those of the row's members.
        advantages: likewise, [R] of each response's tokens; None is 0.
    """
    bounds, none, taken = [0], torch.zeros(0, dtype=torch.int64), []
    pairs = none.view(0, 2)
    columns = [(none, none, none.float(), none.bool(), pairs, none, pairs, none.float())]  # from `MicroBatch.rows` on
    # Padding is a token of the step: a padding token's embedding may be 0, where Gemma 3n's gradient is NaN.
    tokens = torch.full((1, plan.length), rollouts[0].token_ids[0] if rollouts else 0)
    positions = torch.zeros(1, plan.length, dtype=torch.int64)
    is_real = torch.zeros(1, plan.length, dtype=torch.bool)
    for member, place in zip(plan.members, plan.places, strict=True):
        rollout, begin = rollouts[member], bounds[-1]
        sample, ids = rollout.sample, rollout.token_ids
        written = trained_tokens(sample)
        is_known = scores[member].is_known[written]
        trained = written[is_known]
        tokens[0, begin : begin + len(ids)] = torch.tensor(ids)
        is_real[0, begin : begin + len(ids)] = True
        positions[0, begin : begin + place] = torch.arange(place)
        rows = begin + len(rollout.context_ids) - 1 + trained  # the hidden state before each token predicts it
        logp = torch.zeros(len(trained)) if sample.logp is None else torch.tensor(sample.logp)[trained]
        has_logp = torch.full((len(trained),), sample.logp is not None)
        origins = torch.stack([torch.full_like(trained, member), trained], dim=1)
        teachers = torch.full_like(trained, rollout.prompt.teachers)
        earlier = 0 if rollout.carried is None else rollout.carried.num_trained
        end = earlier + len(written)
        ranks = torch.stack([torch.arange(earlier, end)[is_known], torch.full_like(trained, end)], dim=1)
        advantage = torch.zeros(len(trained)) if advantages is None else advantages[member][trained]
        own_ids = torch.tensor(sample.token_ids)[trained]
        columns.append((rows, own_ids, logp, has_logp, origins, teachers, ranks, advantage))
        taken.append(scores[member].take(trained))
        bounds.append(begin + place)
    if bounds[-1] < plan.length:
        positions[0, bounds[-1] :] = torch.arange(plan.length - bounds[-1])
        bounds.append(plan.length)
    own = TeacherScores.cat(taken) if taken else TeacherScores.empty()
    documents = Documents(tuple(bounds), is_rows=plan.is_rows)
    return MicroBatch(tokens, positions, is_real, documents, own, *map(torch.cat, zip(*columns, strict=True)))


def trained_tokens(sample: Sample) -> torch.Tensor:
    """Return the places in a response of the tokens that the student wrote: int64 [N]."""
    if sample.trained is None:
        return torch.arange(len(sample.token_ids))
    return torch.tensor(sample.trained).nonzero()[:, 0]


def micro_batches(
    plan: BatchPlan,
    rollouts: Sequence[Rollout],
    scores: Mapping[int, TeacherScores],
    *,
    parallel: Parallel,
    advantages: Mapping[int, torch.Tensor] | None = None,
) -> list[MicroBatch]:
    """Lay out this rank's micro-batches of a planned global batch, in the plan's order; see `lay_out`."""
    rows = plan.rows[parallel.data_rank]
    return [lay_out(row, rollouts, scores, advantages).context_share(parallel) for row in rows]
