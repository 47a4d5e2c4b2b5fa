"""The teacher's vLLM engine in the rank's process: one prefill over each sequence, the top-k at response positions.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distill_cli.engines import vllm_patches
from distill_cli.engines.base import Teacher
from distill_cli.engines.engine import VllmEngine, request_params
from distill_cli.engines.settings import EngineSettings
from distill_cli.engines.vllm_patches import Interrupted
from distill_cli.errors import DistillError
from distill_cli.types import TeacherScores


class VllmTeacher(VllmEngine, Teacher):
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
            topk: at least 1, at most the vocabulary's size, which is full support.
            temperature: above 0; logits are divided by it (`loss.temperature`).
            should_stop: see `VllmEngine`.
        """
        super().__init__(
            settings,
            role="the teacher",
            should_stop=should_stop,
            # vLLM needs room for the one token that every request samples, although it never enters the model.
            max_model_len=settings.max_model_len + 1,
            max_logprobs=topk,
            # A prefix from the cache has no logits to score, and reading it here gives uninitialised memory.
            enable_prefix_caching=False,
        )
        self._topk, self._temperature = topk, temperature
        self._logits_processors = self.call_worker(vllm_patches.logits_processors)
        if topk > self.vocab_size:
            self.refuse(f"topk is {topk}: the teacher's vocabulary has {self.vocab_size} tokens, lower it")
        if temperature != 1.0 and not self._logits_processors:
            self.refuse(f"loss.temperature is {temperature}: {settings.path} allows only 1 in vLLM")

    def score(self, sequences: Sequence[list[int]], *, response_starts: Sequence[int]) -> list[TeacherScores]:
        """Score with one prefill each; the engine stays usable after a bad request or a failure. See `Teacher`."""
        for index, (ids, start) in enumerate(zip(sequences, response_starts, strict=True)):
            if not 1 <= start <= len(ids):
                what = f"the teacher: response {index} starts at {start} in a sequence of {len(ids)} tokens"
                raise DistillError(f"{what}, allowed are 1 to {len(ids)}")
        self.check_token_ids(sequences, max_len=self.settings.max_model_len)
        scored = {index: start for index, start in enumerate(response_starts) if start < len(sequences[index])}
        scores = [TeacherScores.empty(self._topk) for _ in sequences]
        # Every request of vLLM samples a token; it is not read.
        one = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self._topk, "detokenize": False}
        params = [request_params(score_from=start, skip_clone=True, **one) for start in scored.values()]
        try:
            with self._divided_logits():
                outputs = self.generate([sequences[index] for index in scored], params)
        except Interrupted:
            return scores
        for (index, start), output in zip(scored.items(), outputs, strict=True):
            scores[index] = to_scores(output, start=start)
        return scores

    @contextmanager
    def _divided_logits(self) -> Iterator[None]:
        """Divide the model's logits by the temperature, which vLLM leaves out of a prompt's log-probabilities.

        A 16-bit model rounds its logits once more, unless the temperature is a power of two.
        """
        scales = [processor.scale for processor in self._logits_processors]
        try:
            for processor in self._logits_processors:
                processor.scale /= self._temperature
            yield
        finally:
            for processor, scale in zip(self._logits_processors, scales, strict=True):
                processor.scale = scale


def to_scores(output: Any, *, start: int) -> TeacherScores:
    """Return the scores from position `start` on of a `vllm.RequestOutput` that kept its tensors."""
    # One tuple per chunk of the prompt: ids and log-probabilities of the prompt's own token, then of the top-k. Rows
    # are those of the prompt's last tokens, on GPUs of all but the first.
    chunks, num = output.prompt_logprobs, len(output.prompt_token_ids) - start
    ids_RK1, logp_RK1 = (torch.cat([chunk[part] for chunk in chunks])[-num:].cpu() for part in (0, 1))
    assert len(ids_RK1) == num, "vLLM left positions of a prompt out"
    topk_ids, logp_RK1 = ids_RK1[:, 1:].int(), logp_RK1.float()
    return TeacherScores(topk_ids.contiguous(), logp_RK1[:, 1:].contiguous(), logp_RK1[:, 0].contiguous())
