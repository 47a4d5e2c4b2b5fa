"""Off-policy sequences of a step: answers of the dataset or of the teacher.

They are scored and trained on like the student's. If all sequences are off-policy, the run is supervised warm-up on the
dataset, or offline distillation on the teacher's answers; if some are, it is the mixture of GKD (Agarwal et al. 2024,
algorithm 1).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import ConfigError
from distill_cli.rollout.turns import text_after_turn
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.types import Prompt, Sample


def off_policy_places(num_sequences: int, *, on_policy_fraction: float, seed: int, step: int) -> list[int]:
    """Draw the places of a step's off-policy sequences: anew each step, equal on all ranks, in rising order.

    Their number is rounded so that the share is exact over many steps.
    """
    expected = num_sequences * (1 - on_policy_fraction)
    number = math.floor(step * expected + 1e-9) - math.floor((step - 1) * expected + 1e-9)
    return sorted(random.Random(f"off-policy-{seed}-{step}").sample(range(num_sequences), number))


def teacher_samples(
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    max_new_tokens: int,
    *,
    scoring: ScoringWorker,
    sampling: SamplingSettings,
) -> list[Sample]:
    """Sample the teacher's answers with the student's settings. A collective."""
    sampling = replace(sampling, logp=False, max_new_tokens=max_new_tokens)
    samples = scoring.sample(prompts, seeds=seeds, sampling=sampling)
    return [replace(sample, source="teacher") for sample in samples]


def dataset_samples(
    prompts: Sequence[Prompt], seeds: Sequence[int], max_new_tokens: int, *, encode: Callable[[str], list[int]]
) -> list[Sample]:
    """Return the dataset's answers; seeds have no effect."""
    return [dataset_sample(prompt, encode=encode, max_new_tokens=max_new_tokens) for prompt in prompts]


def dataset_sample(prompt: Prompt, *, encode: Callable[[str], list[int]], max_new_tokens: int) -> Sample:
    """Return the dataset's answer as if it had been sampled, cut if it is too long.

    Raises:
        ConfigError: the row has no answer.
    """
    if not prompt.example.response:
        rule = "has no whole answer, which rollout.off_policy=dataset needs"
        raise ConfigError(f"data.train: row {prompt.index} {rule}; set data.train.response_key, or remove the row")
    ids = encode(prompt.example.response)
    reason = "stop" if len(ids) <= max_new_tokens else "length"
    return Sample(ids[:max_new_tokens], None, reason, source="dataset")


def response_encoder(
    tokenizer: PreTrainedTokenizerBase, *, template_kwargs: Mapping[str, Any]
) -> Callable[[str], list[int]]:
    """Return the function from an answer's text to its tokens, with the token that ends a turn in the chat template."""
    end = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        text = text_after_turn(tokenizer, template_kwargs=template_kwargs)
        end = tokenizer.encode(text, add_special_tokens=False)[:1] or end
    return lambda text: tokenizer.encode(text, add_special_tokens=False) + end
