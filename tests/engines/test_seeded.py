"""Numbers drawn ahead against vLLM's own sampler, which draws them one by one."""

import inspect

import pytest
import torch

from distill_cli.engines.process import patch_vllm, prepare_process

prepare_process()
patch_vllm()

from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler  # noqa: E402

from distill_cli.engines.seeded import NUM_AHEAD  # noqa: E402


def sample(forward, *, rows: dict[int, int], k: int | None, num_tokens: int = 2 * NUM_AHEAD + 3) -> torch.Tensor:
    """-> [num_tokens, 5]: the tokens of five requests, some of which end half-way; `rows` are seeds by row."""
    logits = torch.randn(num_tokens, 5, 97, generator=torch.Generator().manual_seed(0))
    generators = {row: torch.Generator().manual_seed(seed) for row, seed in rows.items()}
    sampler = TopKTopPSampler("raw_logprobs")
    ks = None if k is None else torch.full((5,), k)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = []
        for token in range(num_tokens):
            if token == num_tokens // 2:  # one ends, and the last takes its row: as in vLLM's batch
                generators = {0: generators[4], **{row: generators[row] for row in rows if row in (1, 2, 3)}}
            tokens.append(forward(sampler, logits[token].clone(), generators, ks, None)[0])
    return torch.stack(tokens)


@pytest.mark.parametrize("k", [None, 10])
@pytest.mark.parametrize("rows", [{0: 1, 1: 1, 2: 5, 3: 2**32 - 1, 4: 0}, {0: 3, 4: 4}], ids=["all", "some"])
def test_tokens_are_those_of_numbers_drawn_one_by_one(rows: dict[int, int], k: int | None) -> None:
    ours, stock = TopKTopPSampler.forward_cpu, inspect.unwrap(TopKTopPSampler.forward_cpu)
    assert ours is not stock
    tokens = sample(ours, rows=rows, k=k)
    assert torch.equal(tokens, sample(stock, rows=rows, k=k))
    assert len(tokens.unique()) > 20


def test_patching_again_changes_nothing() -> None:
    stock = inspect.unwrap(TopKTopPSampler.forward_cpu)
    patch_vllm()
    assert TopKTopPSampler.forward_cpu.__wrapped__ is stock
