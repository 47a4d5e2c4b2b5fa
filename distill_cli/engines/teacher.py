"""The teacher's vLLM engine in the rank's process: one prefill over each sequence, the top-k at response positions.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distill_cli.engines import vllm_patches
from distill_cli.engines.base import Teacher
from distill_cli.engines.engine import Engine, Interrupted, request_params
from distill_cli.engines.sample_requests import sample
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import Sample, TeacherScores


class VllmTeacher(Teacher):
    """Scores sequences with the teacher in this process.

    For example:
        teacher = VllmTeacher(settings, topk=64, temperature=1.0)
        scores = teacher.score(sequences, response_starts=[len(prompt) for prompt in prompts])
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        topk: int,
        temperature: float = 1.0,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Load the teacher.

        Args:
            settings: `max_model_len` is the longest sequence that can be scored.
            topk: up to the vocabulary's size, which is full support.
            temperature: logits are divided by it (`loss.temperature`).
            should_stop: `Engine`'s.
        """
        if temperature <= 0:
            raise ConfigError(f"temperature of the teacher is {temperature}: it must be above 0")
        if topk < 1:
            raise ConfigError(f"topk is {topk}: it must be at least 1")
        self.num_ranks = settings.tensor_parallel
        self._topk = topk
        # vLLM wants room for the one token that every request samples, although that token never enters the model.
        self._engine = Engine(
            settings,
            role="the teacher",
            should_stop=should_stop,
            max_model_len=settings.max_model_len + 1,
            max_logprobs=topk,
            # A prefix from the cache has no logits to score, and reading it here gives uninitialised memory.
            enable_prefix_caching=False,
        )
        vocab_size = self._engine.vocab_size
        if topk > vocab_size:
            self.close()
            raise ConfigError(f"topk is {topk}: the teacher's vocabulary has {vocab_size} tokens, lower it")
        self._temperature = temperature
        self._logits_processors = self._engine.call_worker(vllm_patches.logits_processors)
        if temperature != 1.0 and not self._logits_processors:
            self.close()
            raise ConfigError(f"loss.temperature is {temperature}: {settings.path} allows only 1 in vLLM")

    def score(self, sequences: Sequence[list[int]], *, response_starts: Sequence[int]) -> list[TeacherScores]:
        """Score with one prefill each; the engine stays usable after a bad request or a failure. See `Teacher`."""
        self._check(sequences, response_starts)
        scored = [index for index, start in enumerate(response_starts) if start < len(sequences[index])]
        # Every request of vLLM samples a token; this one is not looked at.
        params = request_params(max_tokens=1, temperature=0.0, prompt_logprobs=self._topk, detokenize=False)
        try:
            with self._divided_logits():
                outputs = self._engine.generate([sequences[index] for index in scored], [params] * len(scored))
        except Interrupted:
            return [TeacherScores.empty(self._topk) for _ in sequences]
        scores = {
            index: to_scores(output, start=response_starts[index])
            for index, output in zip(scored, outputs, strict=True)
        }
        return [scores.get(index) or TeacherScores.empty(self._topk) for index in range(len(sequences))]

    def sample(self, prompts: Sequence[list[int]], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        """Sample the teacher's own answers; see `distill_cli.engines.sample_requests.sample`."""
        return sample(self._engine, prompts, seeds=seeds, sampling=sampling)

    def _check(self, sequences: Sequence[list[int]], response_starts: Sequence[int]) -> None:
        if len(sequences) != len(response_starts):
            raise DistillError(f"the teacher got {len(sequences)} sequences and {len(response_starts)} response starts")
        for index, (ids, start) in enumerate(zip(sequences, response_starts, strict=True)):
            if not 1 <= start <= len(ids):
                raise DistillError(
                    f"the teacher: response {index} starts at {start} in a sequence of {len(ids)} tokens, "
                    f"allowed are 1 to {len(ids)}"
                )
        self._engine.check_token_ids(sequences, max_len=self._engine.settings.max_model_len)

    @contextmanager
    def _divided_logits(self) -> Iterator[None]:
        """Divide the model's logits by the temperature, which vLLM leaves out of a prompt's log-probabilities.

        A 16-bit model rounds its logits once more, unless the temperature is a power of two.
        """
        for processor, scale in self._logits_processors:
            processor.scale = scale / self._temperature
        try:
            yield
        finally:
            for processor, scale in self._logits_processors:
                processor.scale = scale

    def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache."""
        self._engine.sleep(level=1)

    def wake(self) -> None:
        """Bring the weights back."""
        self._engine.wake()

    def close(self) -> None:
        self._engine.close()


def to_scores(output: Any, *, start: int) -> TeacherScores:
    # Row i of a prompt's log-probabilities is the distribution of its token i + 1.
    ids_RK1, logp_RK1 = join_prompt_logprobs(output.prompt_logprobs, slice(start - 1, None))
    assert len(ids_RK1) == len(output.prompt_token_ids) - start, "vLLM left positions of a prompt out"
    return TeacherScores(
        topk_ids=ids_RK1[:, 1:].contiguous(),
        topk_logp=logp_RK1[:, 1:].contiguous(),
        sampled_logp=logp_RK1[:, 0].contiguous(),
    )


def join_prompt_logprobs(chunks: list[Any], rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids int32 [rows, K + 1] and log-probabilities float32 [rows, K + 1]: the prompt's own token, then the top-k.

    Row i of a prompt is the distribution of its token i + 1.

    Args:
        chunks: vLLM's tensors, ids and log-probabilities first, one tuple a chunk of the prompt.
    """
    ids, logp = (torch.cat([chunk[part] for chunk in chunks])[rows] for part in (0, 1))
    return ids.cpu().int(), logp.cpu().float()
