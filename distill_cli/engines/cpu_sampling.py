"""What is replaced in vLLM's sampling and scoring on CPUs, where a small model's time is mostly that of small calls.

Declared and checked like `vllm_patches`, which puts it in place. Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from distill_cli.engines.reach import reaches

if TYPE_CHECKING:
    import torch

SCORE_FROM = "distill_score_from"
"""Key of `extra_args`: the first token of the prompt whose log-probabilities are read, at least 1."""
DRAWN_AHEAD = 64
"""Numbers that are drawn from a request's generator at a time."""
SCORED_LOGITS = 2**24
"""Logits that are held at a time while prompts are scored on CPUs."""


@reaches("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._get_prompt_logprobs_dict", only="cpu", replaced=True)
@reaches("vllm.v1.outputs", "LogprobsTensors")
def score_responses_together(score_prompts: Any) -> Any:
    """Score all marked requests of a step together, from `SCORE_FROM` on; the output has no earlier rows. CPU only.

    Symptom: vLLM computes logits for every token of a prompt, one request at a time. Those of the question are not
    read, and for small models the calls take as long as the forward pass (`scripts/bench_score.py`).
    No longer needed when: `prompt_logprobs` can start at a token, and are computed for a whole batch.
    """
    import torch
    from vllm.v1.outputs import LogprobsTensors

    def score(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        begins, by_topk = self.query_start_loc.np, dict[int, list[tuple[str, int, list[int]]]]()
        for request_id, topk in self.num_prompt_logprobs.items():
            request = self.requests[request_id]
            first = (request.sampling_params.extra_args or {}).get(SCORE_FROM)
            ids, num_new = request.prompt_token_ids, num_scheduled_tokens.get(request_id, 0)
            if first is None or ids is None or request.num_computed_tokens or num_new < len(ids):
                return score_prompts(self, hidden_states, num_scheduled_tokens)
            begin = int(begins[self.input_batch.req_id_to_index[request_id]])
            by_topk.setdefault(topk, []).append((request_id, begin + first - 1, ids[first:]))
        self.num_prompt_logprobs.clear()
        return {
            request_id: LogprobsTensors(*fields)
            for topk, requests in by_topk.items()
            for request_id, fields in score_alike(self, hidden_states, requests, topk=topk)
        }

    def score_alike(
        self: Any, hidden_states: torch.Tensor, requests: list[tuple[str, int, list[int]]], *, topk: int
    ) -> Iterator[tuple[str, Any]]:
        """Yield the scores of requests with one top-k: id, row that predicts the first token, tokens."""
        row = torch.cat([torch.arange(first, first + len(ids)) for _, first, ids in requests])
        target, parts = torch.tensor([token for *_, ids in requests for token in ids]), []
        size = max(1, SCORED_LOGITS // self.model_config.get_vocab_size())
        for some, ids in zip(row.split(size), target.split(size), strict=True):
            scores = self.sampler.compute_logprobs(self.model.compute_logits(hidden_states[some]))
            parts.append(self.sampler.gather_logprobs(scores, topk, ids)[:3])
        lengths = [len(ids) for *_, ids in requests]
        fields = [torch.cat(field).split(lengths) for field in zip(*parts, strict=True)]
        return zip((request_id for request_id, *_ in requests), zip(*fields, strict=True), strict=True)

    return score


@reaches("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler.forward_cpu", only="cpu", replaced=True)
@reaches("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p", only="cpu")
def draw_ahead(sample: Any) -> Any:
    """Draw many numbers at once from the generator of a request with a seed: the same numbers. CPU only.

    Symptom: one draw a request and token takes a twentieth of the sampling of a small model.
    No longer needed when: a request's seed is hashed with the number of the token.
    """
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    drawn = WeakKeyDictionary[Any, list[int]]()  # of generators, until their requests end

    def sample_with_drawn(self: Any, logits: Any, generators: dict[int, Any], k: Any, p: Any) -> Any:
        is_known = hasattr(torch.ops._C, "fused_gumbel_argmax") and self.logprobs_mode == "raw_logprobs"
        if not is_known or getattr(self, "use_fp64_gumbel", False) or len(generators) < len(logits):
            return sample(self, logits, generators, k, p)
        chosen = [0] * len(logits)
        for place, generator in generators.items():
            numbers = drawn.setdefault(generator, [])
            if not numbers:
                ahead = torch.randint(0, 2**31, (DRAWN_AHEAD,), generator=generator)
                numbers.extend(reversed(ahead.tolist()))
            chosen[place] = numbers.pop()
        logits = topk_topp_sampler.apply_top_k_top_p(logits, k, p).to(torch.float32)
        return torch.ops._C.fused_gumbel_argmax(logits, torch.tensor(chosen, dtype=torch.int64)), None

    return sample_with_drawn


@reaches("vllm.v1.sample.sampler", "Sampler.gather_logprobs", only="cpu", replaced=True)
def gather_without_ranks(_gather: Any) -> Any:
    """Leave out the rank of each token among all candidates, which nobody here reads: int64 [T] of -1. CPU only.

    Symptom: what counts the ranks is compiled at the first request for log-probabilities, 7 to 19 s; without a compiler
    it costs 1.5 times the top-k of a vocabulary of 152k.
    No longer needed when: ranks are optional in `SamplingParams`.
    """
    import torch
    from vllm.v1.outputs import LogprobsTensors

    def gather(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        ids = token_ids[:, None]
        values, ranks = logprobs.gather(-1, ids), torch.full((len(ids),), -1)
        if num_logprobs:
            top_values, top_ids = torch.topk(logprobs, num_logprobs, dim=-1)
            ids, values = torch.cat([ids, top_ids], dim=1), torch.cat([values, top_values], dim=1)
        return LogprobsTensors(ids.int(), values, ranks)

    return staticmethod(gather)
