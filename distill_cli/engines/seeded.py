"""Requests with seeds on a CPU, nearly as fast as without. Imported after vLLM is set up.

For every token of every request vLLM asks the request's generator for one number, which is a tenth of a tiny model's
time. Here a generator gives several at once, which are the same numbers, so the answers are the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

NUM_AHEAD = 32
HIGHEST = 2**31
_drawn: WeakKeyDictionary[torch.Generator, list[int]] = WeakKeyDictionary()
"""What is left of the numbers that a request's generator gave, the next one last."""


def next_number(generator: torch.Generator) -> int:
    drawn = _drawn.get(generator)
    if not drawn:
        drawn = _drawn[generator] = torch.randint(HIGHEST, (NUM_AHEAD,), generator=generator).tolist()[::-1]
    return drawn.pop()


def draw_ahead(stock: Callable) -> Callable:
    """-> vLLM's `TopKTopPSampler.forward_cpu` with numbers drawn ahead, where log-probabilities are raw."""

    def forward_cpu(
        sampler: Any,
        logits_TV: torch.Tensor,
        generators: Mapping[int, torch.Generator],
        k_T: torch.Tensor | None,
        p_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not generators or sampler.use_fp64_gumbel or not sampler.logprobs_mode.startswith("raw"):
            return stock(sampler, logits_TV, generators, k_T, p_T)
        numbers = torch.randint(HIGHEST, (len(logits_TV),)).tolist()  # for those without a seed
        for row, generator in generators.items():
            numbers[row] = next_number(generator)
        logits_TV = apply_top_k_top_p(logits_TV, k_T, p_T)
        return torch.ops._C.fused_gumbel_argmax(logits_TV.float(), torch.tensor(numbers)), None

    forward_cpu.__wrapped__ = stock
    return forward_cpu
