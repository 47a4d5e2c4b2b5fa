"""Log-probabilities as the engine's tensors, instead of a Python object for every candidate of every token.

vLLM's worker ships tensors; its front end makes dicts of objects of them, with every candidate decoded to text, which
costs several times the forward pass. Requests marked with `KEEP_TENSORS` skip that. Imported after vLLM is set up.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.engine.logprobs import LogprobsProcessor

KEEP_TENSORS = {"distill_keep_tensors": True}
"""`SamplingParams.extra_args` of a request whose log-probabilities stay tensors."""


class TensorLogprobsProcessor(LogprobsProcessor):
    """vLLM's collector of one request's log-probabilities, with a short way for marked requests.

    Theirs end in the request's output as `prompt_logprobs`, a list of vLLM's tensor triples (one a chunk of the
    prompt), and as `outputs[0].logprobs`, a list of floats.
    """

    keeps_tensors = False

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: Any) -> TensorLogprobsProcessor:
        processor = super().from_new_request(tokenizer, request)
        if KEEP_TENSORS.items() <= (request.sampling_params.extra_args or {}).items():
            processor.keeps_tensors = True
            processor.prompt_logprobs = []
            processor.logprobs = []
        return processor

    def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
        if self.keeps_tensors:
            self.prompt_logprobs.append(prompt_logprobs_tensors)
        else:
            super()._update_prompt_logprobs(prompt_logprobs_tensors)

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        if self.keeps_tensors:
            _ids, logp, *_ = logprobs_lists
            self.logprobs.extend(logp[:, 0].tolist())  # the sampled token comes first
        else:
            super()._update_sample_logprobs(logprobs_lists)


def join_prompt_logprobs(chunks: list[Any], rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids int32 [rows, K + 1] and log-probabilities float32 [rows, K + 1]: the prompt's own token, then the top-k.

    Row i of a prompt is the distribution of its token i + 1.
    """
    ids, logp = (torch.cat([chunk[part] for chunk in chunks])[rows] for part in (0, 1))
    return ids.cpu().int(), logp.cpu().float()
