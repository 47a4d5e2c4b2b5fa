"""Packing: every token once, each row the hidden state that predicts a response token, rounds of about equal size."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.rollout.pack import BatchPlan, MicroBatch, Planner, lay_out, padded_length, plan_batch
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    return Rollout(Prompt(0, prompt, Example("q")), Sample(response, [-0.5 * token for token in response], "stop"))


def scores_of(rollout: Rollout, topk: int = 2) -> TeacherScores:
    marks = torch.tensor(rollout.sample.token_ids, dtype=torch.float32)
    top = marks[:, None].repeat(1, topk)
    return TeacherScores.of_topk(topk_ids=top.int(), topk_logp=-top, sampled_logp=-marks)


def one_row(rollouts: list[Rollout], *, multiple: int = 1, packing: bool = True) -> MicroBatch:
    lengths = [len(r.token_ids) for r in rollouts]
    plan = plan_batch(lengths, num_ranks=1, max_tokens=100, multiple=multiple, packing=packing)
    ((row,),) = plan.rows
    return lay_out(row, rollouts, dict(enumerate(map(scores_of, rollouts))))


def test_rows_precede_response_tokens() -> None:
    batch = one_row([rollout([1, 2, 3], [4, 5]), rollout([6], [7, 8, 9])], multiple=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.documents.bounds == (0, 5, 9, 12)
    assert batch.rows.tolist() == [2, 3, 5, 6, 7]
    assert batch.sampled_ids.tolist() == [4, 5, 7, 8, 9]
    assert batch.scores.topk_ids[:, 0].tolist() == batch.sampled_ids.tolist()
    assert batch.scores.sampled_logp.tolist() == (-batch.sampled_ids).tolist()
    assert batch.sampler_logp.tolist() == [-2.0, -2.5, -3.5, -4.0, -4.5]
    assert batch.has_sampler_logp.all()
    assert batch.origins.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]


def test_other_writers_have_no_logp() -> None:
    own, other = rollout([1], [2, 3]), rollout([1], [4, 5, 6])
    batch = one_row([own, replace(other, sample=replace(other.sample, logp=None, source="teacher"))])
    assert batch.sampler_logp[batch.has_sampler_logp].tolist() == [-1.0, -1.5]
    assert batch.has_sampler_logp.tolist() == [token < 4 for token in batch.sampled_ids.tolist()]


def test_left_out_tokens_have_no_rows() -> None:
    """A teacher with other tokens says nothing of the second one; the others keep their places in the answer."""
    one = rollout([1, 2], [4, 5, 6])
    scores = scores_of(one)
    ids, aligned = scores.topk_ids.clone(), torch.zeros(3, 2)
    ids[1] = -1
    ((row,),) = plan_batch([5], num_ranks=1, max_tokens=8).rows
    batch = lay_out(row, [one], {0: replace(scores, topk_ids=ids, alignment=aligned)})
    assert batch.rows.tolist() == [1, 3]
    assert batch.sampled_ids.tolist() == [4, 6]
    assert batch.origins.tolist() == [[0, 0], [0, 2]]
    assert batch.trained_places.tolist() == [[0, 3], [2, 3]]
    assert batch.scores.sampled_logp.tolist() == [-4, -6]


def test_members_are_places_in_the_step() -> None:
    rollouts = [rollout([1], [2] * length) for length in (5, 3, 4, 1, 7, 2)]
    planner = Planner(global_batch_size=4, rank=1, cut=partial(plan_batch, num_ranks=2, max_tokens=8))
    plans = planner.plan(rollouts)
    assert [plan.members for plan in plans] == [[0, 1, 2, 3], [4, 5]]
    assert planner.local_places(plans) == [*plans[0].members_of(1), *plans[1].members_of(1)]
    alone = plan_batch([len(one.token_ids) for one in rollouts[4:]], num_ranks=2, max_tokens=8)
    assert [row.length for rows in plans[1].rows for row in rows] == [row.length for rows in alone.rows for row in rows]


def test_unpacked_sequences_share_a_length() -> None:
    batch = one_row([rollout([1, 2], [3, 4, 5, 6, 7, 8, 9]), rollout([1], [2, 3, 4, 5, 6])], packing=False)
    assert padded_length(9) == 10
    assert batch.documents.bounds == (0, 10, 20)
    assert batch.documents.batch(batch.input_ids).shape == (2, 10)
    shared = plan_batch([9, 6], num_ranks=1, max_tokens=100, packing=False, one_row=True)  # by context ranks
    assert not shared.rows[0][0].is_rows
    assert batch.input_ids[0, 10:].tolist() == [1, 2, 3, 4, 5, 6, 1, 1, 1, 1]
    assert batch.rows.tolist() == [1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 80), st.booleans(), st.sampled_from([1, 2, 8]))
def test_plans_are_complete_and_equal(
    lengths: list[int], num_ranks: int, max_tokens: int, packing: bool, multiple: int
) -> None:
    plan = plan_batch(lengths, num_ranks=num_ranks, max_tokens=max_tokens, packing=packing, multiple=multiple)
    assert len(plan.rows) == num_ranks
    assert len({len(rows) for rows in plan.rows}) == 1
    assert sorted(member for rank in range(num_ranks) for member in plan.members_of(rank)) == list(range(len(lengths)))
    for row in (row for rows in plan.rows for row in rows):
        assert all(place >= lengths[member] for member, place in zip(row.members, row.places, strict=True))
        assert sum(row.places) <= max_tokens or len(row.members) == 1
        assert sum(row.places) <= row.length <= max(sum(row.places), 1) + multiple - 1
        assert row.length % multiple == 0
    assert plan.num_tokens <= plan.computed_tokens


@pytest.mark.parametrize("seed", range(5))
def test_long_tailed_lengths_pack_well(seed: int) -> None:
    generator, lengths = random.Random(seed), []
    while sum(lengths) < 7.5 * 8 * 16384:
        lengths.append(max(16, min(8192, int(generator.lognormvariate(6.9, 1.0)))))
    plan: BatchPlan = plan_batch(lengths, num_ranks=8, max_tokens=16384)
    assert len(plan.rows[0]) == 8
    assert plan.num_tokens / plan.computed_tokens > 0.95


@given(st.integers(1, 100_000))
def test_padding_wastes_at_most_a_quarter(length: int) -> None:
    assert length <= padded_length(length) <= max(length * 1.25, length + 1)
    assert padded_length(padded_length(length)) == padded_length(length)


def test_empty_rows_have_no_loss() -> None:
    plan = plan_batch([5], num_ranks=2, max_tokens=10, multiple=4)
    batch = lay_out(plan.rows[1][0], [], {})
    assert batch.num_response_tokens == 0
    assert len(batch.scores.topk_ids) == len(batch.scores.sampled_logp) == 0
    assert batch.documents.bounds == (0, 4)
