"""The part of a step's sequences that the student did not write: answers of the dataset or of the teacher.

They are scored and trained on as the student's own are. All of them: supervised warm-up from the dataset, or offline
distillation from the teacher's answers; some of them: the mixture of GKD (Agarwal et al. 2024, algorithm 1).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import ConfigError
from distill_cli.rollout.collect import sequence_seed
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.turns import SAID
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.types import Prompt, Rollout, Sample


@dataclass
class Mixture(RolloutSource):
    """The student writes a share of each step's sequences, the dataset or the teacher the others."""

    student: OnPolicy
    on_policy_fraction: float
    seed: int
    """`train.seed`."""
    write_others: Callable[[Sequence[Prompt], Sequence[int]], list[Sample]]
    """Prompts and a seed for each -> their answers, such as `dataset_samples` or `teacher_samples`. A collective."""

    def step(self, step: int) -> ScoredBatch:
        prompts = self.student.prompts_of(step)
        off = off_policy_places(len(prompts), on_policy_fraction=self.on_policy_fraction, seed=self.seed, step=step)
        on = sorted(set(range(len(prompts))) - set(off))
        own = self.student.sample([prompts[place] for place in on], step=step, places=on)
        seeds = [sequence_seed(self.seed, step=step, sequence=place) for place in off]
        others = self.write_others([prompts[place] for place in off], seeds) if off else []
        rollouts = dict(zip(on, own, strict=True))
        rollouts |= {place: Rollout(prompts[place], other) for place, other in zip(off, others, strict=True)}
        return self.student.score([rollouts[place] for place in range(len(prompts))], step=step)


def off_policy_places(num_sequences: int, *, on_policy_fraction: float, seed: int, step: int) -> list[int]:
    """Draw which of a step's sequences are off-policy: anew each step, the same on every rank, in rising order.

    Their number is rounded; over the steps the rounding evens out.
    """
    expected = num_sequences * (1 - on_policy_fraction)
    number = math.floor(step * expected + 1e-9) - math.floor((step - 1) * expected + 1e-9)
    return sorted(random.Random(f"off-policy-{seed}-{step}").sample(range(num_sequences), number))


def teacher_samples(
    prompts: Sequence[Prompt], seeds: Sequence[int], *, scoring: ScoringWorker, sampling: SamplingSettings
) -> list[Sample]:
    """Sample the teacher's answers as the student's are sampled. A collective."""
    samples = scoring.sample(prompts, seeds=seeds, sampling=replace(sampling, logp=False))
    return [replace(sample, source="teacher") for sample in samples]


def dataset_samples(
    prompts: Sequence[Prompt], seeds: Sequence[int], *, encode: Callable[[str], list[int]], max_new_tokens: int
) -> list[Sample]:
    """Return the dataset's answers; the seeds are of no use to it."""
    return [dataset_sample(prompt, encode=encode, max_new_tokens=max_new_tokens) for prompt in prompts]


def dataset_sample(prompt: Prompt, *, encode: Callable[[str], list[int]], max_new_tokens: int) -> Sample:
    """Return the dataset's answer as if it had been sampled, cut if it is too long.

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
    return Sample(ids[:max_new_tokens], None, "stop" if ended else "length", source="dataset")


def response_encoder(tokenizer, *, template_kwargs: dict) -> Callable[[str], list[int]]:
    """Text of an answer -> its tokens, with the one that the chat template ends a turn with."""
    end = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
        end = tokenizer.encode(rendered[rendered.index(SAID) + len(SAID) :], add_special_tokens=False)[:1] or end
    return lambda text: tokenizer.encode(text, add_special_tokens=False) + end
