"""What an engine needs to score sequences: one prefill over each, the top-k at response positions.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distill_cli.engines import vllm_patches
from distill_cli.engines.base import check_starts
from distill_cli.engines.engine import VllmEngine, request_params
from distill_cli.engines.hidden_states import HIDDEN, read_head
from distill_cli.engines.settings import EngineSettings
from distill_cli.engines.vllm_patches import Interrupted
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import ModelHead, TeacherScores


class Scoring(VllmEngine):
    """An engine that scores; a subclass builds it with `engine_arguments` and then calls `prepare_scoring`."""

    @staticmethod
    def engine_arguments(settings: EngineSettings, *, topk: int) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM` without which scoring fails."""
        return {
            # vLLM needs room for the one token that every request samples, although it never enters the model.
            "max_model_len": settings.max_model_len + 1,
            "max_logprobs": topk,
            # A prefix from the cache has no logits to score, and reading it here gives uninitialised memory.
            "enable_prefix_caching": False,
        }

    def prepare_scoring(self, *, topk: int, temperature: float = 1.0) -> None:
        """Take what `score` keeps and scores at unless a call says otherwise. Raises ConfigError."""
        self._topk, self._temperature = topk, temperature
        self._logits_processors = self.call_worker(vllm_patches.logits_processors)
        if topk > self.vocab_size:
            self.refuse(f"topk is {topk}: the teacher's vocabulary has {self.vocab_size} tokens, lower it")
        if temperature != 1.0 and not self._logits_processors:
            self.refuse(f"loss.temperature is {temperature}: {self.settings.path} allows only 1 in vLLM")

    def score(
        self,
        sequences: Sequence[list[int]],
        *,
        response_starts: Sequence[int],
        topk: int | Sequence[int] | None = None,
        temperature: float | None = None,
        vocab_size: int | None = None,
        hidden: bool = False,
    ) -> list[TeacherScores]:
        """Score with one prefill each; the engine stays usable after a bad request or a failure. See `Teacher`.

        Args:
            topk: tokens that are kept at each position, for all sequences or for each; at most the teacher's own.
                None is the teacher's own, like the two below.
            temperature: above 0.
            vocab_size: first id that gets no probability; at most the teacher's own.
            hidden: return hidden states instead of a top-k, to which the options above do not apply.
        """
        check_starts(sequences, response_starts)
        kept = [self._topk if topk is None else topk] * len(sequences) if not isinstance(topk, Sequence) else topk
        self.check_options(kept, temperature=temperature, vocab_size=vocab_size)
        self.check_token_ids(sequences, max_len=self.settings.max_model_len, vocab_size=vocab_size)
        scored = {index: start for index, start in enumerate(response_starts) if start < len(sequences[index])}
        scores = [TeacherScores.empty(number) for number in kept]
        if hidden:
            scores = [TeacherScores.of_hidden(torch.empty(0, self.hidden_size, dtype=self.dtype)) for _ in sequences]
        # Every request of vLLM samples a token; it is not read.
        one: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        one |= {"marks": HIDDEN if hidden else None, "skip_clone": True}
        params = [
            request_params(score_from=start, prompt_logprobs=1 if hidden else kept[index], **one)
            for index, start in scored.items()
        ]
        try:
            with self.changed_logits(temperature=temperature or self._temperature, vocab_size=vocab_size):
                outputs = self.generate([sequences[index] for index in scored], params)
        except Interrupted:
            return scores
        for (index, start), output in zip(scored.items(), outputs, strict=True):
            scores[index] = to_hidden(output) if hidden else to_scores(output, start=start)
        return scores

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        """Return the head that makes logits of the hidden states; see `Teacher.head`."""
        found = self.call_worker(read_head)
        if isinstance(found, str):
            fix = "set loss.support=teacher and rollout.save_scores=true or false"
            raise ConfigError(f"{self.settings.path}: {found}: its hidden states are of no use; {fix}")
        return found.part(rows)

    @property
    def hidden_size(self) -> int:
        return int(self.llm.model_config.get_hidden_size())

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.model_config.dtype

    def check_options(self, topks: Sequence[int], *, temperature: float | None, vocab_size: int | None) -> None:
        """Raise DistillError for options of a call that this engine cannot apply."""
        size = self.vocab_size if vocab_size is None else vocab_size
        if not 1 <= size <= self.vocab_size:
            raise DistillError(f"the teacher: vocab_size is {size}, allowed are 1 to {self.vocab_size}")
        most = min(self._topk, size)
        if wrong := [topk for topk in topks if not 1 <= topk <= most]:
            raise DistillError(f"the teacher: topk is {wrong[0]}, allowed are 1 to {most}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise DistillError(f"the teacher: temperature is {temperature}, must be above 0")
        if not self._logits_processors and (temperature or 1.0, size) != (1.0, self.vocab_size):
            raise DistillError(f"the teacher: {self.settings.path} allows only temperature 1 and its whole vocabulary")

    @contextmanager
    def changed_logits(self, *, temperature: float, vocab_size: int | None) -> Iterator[None]:
        """Divide the model's logits by the temperature, which vLLM leaves out of a prompt's log-probabilities.

        With `vocab_size` they end before that id. A 16-bit model rounds its logits once more, unless the temperature is
        a power of two.
        """
        before = [(processor.scale, processor.org_vocab_size) for processor in self._logits_processors]
        try:
            for processor in self._logits_processors:
                processor.scale /= temperature
            if vocab_size is not None:
                self.call_worker(vllm_patches.cut_vocabulary, vocab_size)
            yield
        finally:
            for processor, (scale, size) in zip(self._logits_processors, before, strict=True):
                processor.scale, processor.org_vocab_size = scale, size


def to_scores(output: Any, *, start: int) -> TeacherScores:
    """Return the scores from position `start` on of a `vllm.RequestOutput` that kept its tensors."""
    # One tuple per chunk of the prompt: ids and log-probabilities of the prompt's own token, then of the top-k. Rows
    # are those of the prompt's last tokens, on GPUs of all but the first.
    chunks, num = output.prompt_logprobs, len(output.prompt_token_ids) - start
    ids_RK1, logp_RK1 = (torch.cat([chunk[part] for chunk in chunks])[-num:].cpu() for part in (0, 1))
    assert len(ids_RK1) == num, "vLLM left positions of a prompt out"
    topk_ids, logp_RK1 = ids_RK1[:, 1:].int(), logp_RK1.float()
    return TeacherScores.of_topk(topk_ids.contiguous(), logp_RK1[:, 1:].contiguous(), logp_RK1[:, 0].contiguous())


def to_hidden(output: Any) -> TeacherScores:
    """Return the hidden states of a `vllm.RequestOutput` that was marked for them."""
    return TeacherScores.of_hidden(torch.cat([chunk[1] for chunk in output.prompt_logprobs]).cpu())
