"""The teacher's engine: one prefill over each sequence, the top-k at its response positions.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distill_cli.engines.engine import Engine, check_token_ids, sampling_params
from distill_cli.engines.settings import EngineSettings
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import TeacherScores


class Scorer:
    """Scores sequences with the teacher.

    scorer = Scorer(settings, topk=64, temperature=1.0)
    scores = scorer.score(sequences, response_starts=[len(prompt) for prompt in prompts])
    """

    def __init__(self, settings: EngineSettings, *, topk: int, temperature: float = 1.0) -> None:
        """Load the teacher.

        Args:
            settings: `max_model_len` is the longest sequence that can be scored.
            topk: up to the vocabulary's size, which is full support.
            temperature: logits are divided by it (`loss.temperature`).
        """
        if temperature <= 0:
            raise ConfigError(f"temperature of the scorer is {temperature}: it must be above 0")
        if topk < 1:
            raise ConfigError(f"topk is {topk}: it must be at least 1")
        self._topk = topk
        self._max_len = settings.max_model_len
        # vLLM wants room for the one token that every request samples, although that token never enters the model.
        self._engine = Engine(
            settings,
            role="the scorer",
            max_model_len=settings.max_model_len + 1,
            max_logprobs=topk,
            skip_tokenizer_init=True,
            # A prefix from the cache has no logits to score, and reading it here gives uninitialised memory.
            enable_prefix_caching=False,
        )
        vocab_size = self._engine.vocab_size
        if topk > vocab_size:
            self.close()
            raise ConfigError(f"topk is {topk}: the teacher's vocabulary has {vocab_size} tokens, lower it")
        if temperature != 1.0:
            self._engine.call_worker(divide_logits, temperature)

    def score(self, sequences: Sequence[list[int]], *, response_starts: Sequence[int]) -> list[TeacherScores]:
        """The teacher's view of each sequence, in their order.

        Args:
            sequences: token ids of prompt and response.
            response_starts: where each response starts, at least 1: a first token has no distribution before it.

        Raises:
            DistillError: a bad request, or a failure in the engine, which stays usable.
        """
        self._check(sequences, response_starts)
        scored = [index for index, start in enumerate(response_starts) if start < len(sequences[index])]
        # Every request of vLLM samples a token; this one is not looked at.
        params = sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=self._topk, detokenize=False)
        outputs = self._engine.generate([sequences[index] for index in scored], [params] * len(scored))
        scores = [empty_scores(self._topk) for _ in sequences]
        for index, output in zip(scored, outputs, strict=True):
            scores[index] = to_scores(output, start=response_starts[index])
        return scores

    def _check(self, sequences: Sequence[list[int]], response_starts: Sequence[int]) -> None:
        if len(sequences) != len(response_starts):
            raise DistillError(f"the scorer got {len(sequences)} sequences and {len(response_starts)} response starts")
        for index, (ids, start) in enumerate(zip(sequences, response_starts, strict=True)):
            if not 1 <= start <= len(ids):
                raise DistillError(
                    f"the scorer: response {index} starts at {start} in a sequence of {len(ids)} tokens, "
                    f"allowed are 1 to {len(ids)}"
                )
        check_token_ids(sequences, vocab_size=self._engine.vocab_size, max_len=self._max_len, role="the scorer")

    def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache."""
        self._engine.sleep(level=1)

    def wake(self) -> None:
        """Bring the weights back."""
        self._engine.wake()

    def close(self) -> None:
        """Free the engine: before `destroy_process_group`."""
        self._engine.close()


def to_scores(output: Any, *, start: int) -> TeacherScores:
    from distill_cli.engines.logprobs import join_prompt_logprobs

    # Row i of a prompt's log-probabilities is the distribution of its token i + 1.
    ids_RK1, logp_RK1 = join_prompt_logprobs(output.prompt_logprobs, slice(start - 1, None))
    return TeacherScores(
        topk_ids=ids_RK1[:, 1:].contiguous(),
        topk_logp=logp_RK1[:, 1:].contiguous(),
        sampled_logp=logp_RK1[:, 0].contiguous(),
    )


def empty_scores(topk: int) -> TeacherScores:
    return TeacherScores(
        topk_ids=torch.empty(0, topk, dtype=torch.int32),
        topk_logp=torch.empty(0, topk),
        sampled_logp=torch.empty(0),
    )


def divide_logits(worker: Any, temperature: float) -> None:
    """Inside vLLM's worker: log-probabilities of a prompt know no temperature, so the model's logits get it.

    A 16-bit model rounds its logits once more, unless the temperature is a power of two.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    model = worker.get_model()
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if not processors:
        raise DistillError(
            f"{type(model).__name__} has no LogitsProcessor in vLLM: only loss.temperature=1 is possible"
        )
    for processor in processors:
        processor.scale /= temperature
