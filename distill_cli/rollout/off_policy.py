"""The part of a step's sequences that the student did not write: answers of the dataset or of the teacher.

They are scored and trained on as the student's own are. All of them: supervised warm-up from the dataset, or offline
distillation from the teacher's answers; some of them: the mixture of GKD (Agarwal et al. 2024, algorithm 1).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from distill_cli.errors import ConfigError
from distill_cli.rollout.turns import SAID
from distill_cli.types import Prompt, Sample


def off_policy_places(num_sequences: int, *, on_policy_fraction: float, seed: int, step: int) -> set[int]:
    """Which of a step's sequences are off-policy: another draw each step, the same on every rank.

    Their number is rounded; over the steps the rounding evens out.
    """
    expected = num_sequences * (1 - on_policy_fraction)
    number = math.floor(step * expected + 1e-9) - math.floor((step - 1) * expected + 1e-9)
    return set(random.Random(f"off-policy-{seed}-{step}").sample(range(num_sequences), number))


def dataset_sample(prompt: Prompt, *, encode: Callable[[str], list[int]], max_new_tokens: int) -> Sample:
    """The dataset's answer as if it had been sampled; cut like one that is too long.

    Raises:
        ConfigError: the row has none.
    """
    if not prompt.example.response:
        raise ConfigError(
            f"data.train: row {prompt.index} has no whole answer, which rollout.off_policy=dataset needs; give "
            "data.train.response_key, or rows that have one"
        )
    ids = encode(prompt.example.response)
    ended = len(ids) <= max_new_tokens
    return foreign(ids[:max_new_tokens], "stop" if ended else "length", source="dataset")


def foreign(token_ids: list[int], finish_reason: str, *, source: str) -> Sample:
    """An answer that is not the student's: what the student would have given its tokens is not known."""
    return Sample(token_ids, [math.nan] * len(token_ids), finish_reason, source=source)


def response_encoder(tokenizer, *, template_kwargs: dict) -> Callable[[str], list[int]]:
    """Text of an answer -> its tokens, with the one that the chat template ends a turn with."""
    end = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
        end = tokenizer.encode(rendered[rendered.index(SAID) + len(SAID) :], add_special_tokens=False)[:1] or end
    return lambda text: tokenizer.encode(text, add_special_tokens=False) + end
