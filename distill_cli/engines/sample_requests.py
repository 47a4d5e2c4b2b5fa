"""Answers from a vLLM engine: tokens in and tokens out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.engine import Engine, Interrupted, request_params
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.errors import DistillError
from distill_cli.types import Sample


class Answerer(AnsweringEngine):
    """A model that answers with the weights of its folder, and does nothing else: for evaluations."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = Engine(settings, role="the engine")
        self.num_ranks = settings.tensor_parallel

    def sample(self, prompts: Sequence[list[int]], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        return sample(self._engine, prompts, seeds=seeds, sampling=sampling)

    def close(self) -> None:
        self._engine.close()


def sample(
    engine: Engine, prompts: Sequence[list[int]], *, seeds: Sequence[int], sampling: SamplingSettings
) -> list[Sample]:
    """One answer to each prompt, in their order.

    Args:
        prompts: token ids; shorter than the engine's `max_model_len`.
        seeds: one a prompt, any integers. A prompt, a seed and the weights decide the answer; prompts that share a
            seed get correlated answers.

    Returns:
        Samples whose `logp` is raw: at temperature 1 over the whole vocabulary, whatever `sampling` says, and None
        without `sampling.logp`. If the engine was interrupted, they have no tokens.

    Raises:
        DistillError: a bad request, or a failure in the engine, which stays usable.
    """
    if len(prompts) != len(seeds):
        raise DistillError(f"{engine.role} got {len(prompts)} prompts and {len(seeds)} seeds")
    if sampling.stop and engine.llm.model_config.skip_tokenizer_init:  # vLLM would ignore them
        raise DistillError(f"{engine.role} has no tokenizer (skip_tokenizer_init): it cannot stop at strings")
    max_len = engine.settings.max_model_len
    engine.check_token_ids(prompts, max_len=max_len - 1)
    params = [
        sampling_params(sampling, seed=seed, max_tokens=min(sampling.max_new_tokens, max_len - len(prompt)))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    try:
        return [to_sample(output, logp=sampling.logp) for output in engine.generate(prompts, params)]
    except Interrupted:
        return [Sample([], [] if sampling.logp else None, "length") for _ in prompts]


def sampling_params(sampling: SamplingSettings, *, seed: int, max_tokens: int) -> Any:
    """-> `vllm.SamplingParams` of one request."""
    return request_params(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=fold_seed(seed),
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=0 if sampling.logp else None,  # of the sampled token alone
        detokenize=bool(sampling.stop),
        skip_clone=True,  # each request has its own
    )


def fold_seed(seed: int) -> int:
    """A seed's 32 bits for torch's CPU generator, which drops the higher ones: 0 and 2**32 would sample the same."""
    return zlib.crc32(str(seed).encode())


def to_sample(output: Any, *, logp: bool) -> Sample:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise DistillError(f"vLLM ended a response with {completion.finish_reason!r}")
    values = list(completion.logprobs) if logp else None
    return Sample(list(completion.token_ids), values, completion.finish_reason)
