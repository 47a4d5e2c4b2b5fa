"""Packing: every token once, each row the hidden state that predicts a response token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.rollout.pack import empty_micro_batch, first_fit_decreasing, pack
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores


def rollout(prompt: list[int], response: list[int], topk: int = 2) -> Rollout:
    marks = torch.tensor(response, dtype=torch.float32)
    return Rollout(
        Prompt(0, prompt, Example("q")),
        Sample(response, [-0.5 * token for token in response], "stop"),
        scores=TeacherScores(
            topk_ids=torch.tensor(response, dtype=torch.int32)[:, None].repeat(1, topk),
            topk_logp=-marks[:, None].repeat(1, topk),
            sampled_logp=-marks,
        ),
    )


def test_rows_are_the_positions_before_the_response_tokens() -> None:
    (batch,) = pack([rollout([1, 2, 3], [4, 5]), rollout([6], [7, 8, 9])], max_tokens=16)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.document_bounds == (0, 5, 9)
    assert batch.rows.tolist() == [2, 3, 5, 6, 7]
    assert batch.sampled_ids.tolist() == [4, 5, 7, 8, 9]
    assert batch.input_ids[0, batch.rows + 1].tolist() == batch.sampled_ids.tolist()
    assert batch.topk_ids[:, 0].tolist() == batch.sampled_ids.tolist()
    assert batch.sampler_logp.tolist() == [-2.0, -2.5, -3.5, -4.0, -4.5]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=30), st.integers(1, 40))
def test_packing_keeps_every_sequence_whole_and_once(lengths: list[tuple[int, int]], max_tokens: int) -> None:
    rollouts = [rollout([1] * p, list(range(2, 2 + r))) for p, r in lengths]
    batches = pack(rollouts, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch.sequences) == list(range(len(rollouts)))
    for batch in batches:
        sizes = [len(rollouts[i].token_ids) for i in batch.sequences]
        assert batch.num_tokens == sum(sizes)
        assert batch.num_tokens <= max_tokens or len(sizes) == 1
        assert torch.equal(batch.input_ids[0, batch.rows + 1], batch.sampled_ids)


@given(st.lists(st.integers(1, 100), max_size=40))
def test_bins_waste_less_than_half(lengths: list[int]) -> None:
    bins = first_fit_decreasing(lengths, 100)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in members) for members in bins]
    assert all(total <= 100 for total in sums)
    assert sum(total <= 50 for total in sums) <= 1


def test_an_empty_micro_batch_carries_no_loss() -> None:
    batch = empty_micro_batch(topk=5)
    assert batch.num_response_tokens == 0
    assert batch.topk_ids.shape == (0, 5)
    assert batch.document_bounds[-1] == batch.num_tokens
