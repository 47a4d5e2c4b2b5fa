"""Examples become prompts, once; and the order in which training sees them."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill_cli.config.schema import DataConfig, ModelConfig
from distill_cli.errors import ConfigError
from distill_cli.types import Example, Prompt

log = logging.getLogger(__name__)


def load_tokenizer(folder: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The student's tokenizer, with `model.chat_template` in place of its own where one is given."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    if model.chat_template is not None:
        file = Path(model.chat_template)
        is_file = len(model.chat_template) < 1024 and file.is_file()
        tokenizer.chat_template = file.read_text() if is_file else model.chat_template
    if tokenizer.chat_template is None:
        log.warning("the tokenizer has no chat template: prompts are the plain text of data.prompt_template")
    return tokenizer


def build_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: DataConfig,
    model: ModelConfig,
    max_tokens: int,
) -> list[Prompt]:
    """Each example through the prompt template, the chat template and the tokenizer.

    Prompts of more than `max_tokens` are left out, with a warning that counts them.

    Raises:
        ConfigError: none is short enough, or a template fails (which row, which error).
    """
    prompts = []
    for index, example in enumerate(examples):
        try:
            token_ids = _token_ids(example, tokenizer, data, model)
        except Exception as error:  # a template is the user's code: it raises what it likes
            raise ConfigError(f"row {index}: the prompt's template failed: {type(error).__name__}: {error}") from error
        if 0 < len(token_ids) <= max_tokens:
            prompts.append(Prompt(index=index, token_ids=token_ids, example=example))
    left_out = len(examples) - len(prompts)
    if not prompts:
        raise ConfigError(
            f"data.max_prompt_tokens={max_tokens}: all {left_out} prompts are longer; raise it, or lower "
            "rollout.max_new_tokens, which shares rollout.max_sequence_length with the prompt"
        )
    if left_out:
        log.warning("%d of %d prompts are longer than %d tokens and left out", left_out, len(examples), max_tokens)
    return prompts


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts a step sees: a new permutation each epoch, the same on every rank and any number of ranks."""

    prompts: Sequence[Prompt]
    batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"rollout.prompts_per_step={self.batch_size}: the training data has only {len(self.prompts)} prompts"
            )

    @property
    def steps_per_epoch(self) -> int:
        """A last batch that is not full is left out of its epoch."""
        return len(self.prompts) // self.batch_size

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
        return [self.prompts[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]


def _token_ids(example: Example, tokenizer: PreTrainedTokenizerBase, data: DataConfig, model: ModelConfig) -> list[int]:
    text = data.prompt_template.replace("{question}", example.question)
    if tokenizer.chat_template is None:
        return tokenizer.encode(text if data.system_prompt is None else f"{data.system_prompt}\n\n{text}")
    messages = [{"role": "user", "content": text}]
    if data.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **model.chat_template_kwargs
    )
    return tokenizer.encode(rendered, add_special_tokens=False)
