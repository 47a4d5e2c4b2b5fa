"""Examples become prompts: templates applied, tokenized once, for the student and, where it reads another, the teacher.

Response tokens are shared, prompts need not be: the teacher may have a template of its own (`model.teacher`), or be
shown what the student is not (`data.teacher_context`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill_cli.config.schema import DataConfig, ModelConfig, OverlongPrompts
from distill_cli.errors import ConfigError
from distill_cli.models.model_pair import OWN_TEMPLATE, read_template
from distill_cli.types import Example, Prompt

log = logging.getLogger(__name__)

MAX_TOKEN_CHARACTERS = 256
"""No tokenizer's tokens are that long on average: a longer text is too long without being tokenized."""


def load_tokenizer(folder: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The student's tokenizer, with `model.chat_template` in place of its own where one is given."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    if tokenizer.chat_template is None:
        log.warning("the tokenizer has no chat template: prompts are the plain text of data.prompt_template")
    return tokenizer


def load_template(folder: Path, *, trust_remote_code: bool = False) -> str:
    """A model's own chat template. Raises ConfigError where it has none."""
    template = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code).chat_template
    if template is None:
        raise ConfigError(f"model.teacher.chat_template={OWN_TEMPLATE}: {folder} has no chat template; give one")
    return template


class PromptMaker:
    """Makes prompts of examples, and counts those that it leaves out or cuts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: DataConfig,
        model: ModelConfig,
        max_tokens: int,
        teacher_max_tokens: int | None = None,
        teacher_template: str | None = None,
        opening: Callable[[Example], str] | None = None,
    ) -> None:
        """
        Args:
            max_tokens: of the student's prompt.
            teacher_max_tokens: of the teacher's; None is the same.
            teacher_template: the teacher's chat template; None is the student's.
            opening: what is asked in place of an example's question, where an environment says it.
        """
        self.tokenizer, self.data, self.model = tokenizer, data, model
        self.max_tokens, self.teacher_max_tokens = max_tokens, teacher_max_tokens or max_tokens
        self.template_kwargs = dict(model.chat_template_kwargs)
        self.teacher_kwargs = {**self.template_kwargs, **model.teacher.chat_template_kwargs}
        self.teacher_template, self.opening = teacher_template, opening
        self.has_teacher_prompt = (
            data.teacher_context is not None
            or teacher_template is not None
            or self.teacher_kwargs != self.template_kwargs
        )
        self.counts: Counter[str] = Counter()
        self.refusal = ""
        """What the environment said of the last row that it does not take."""

    def __call__(self, example: Example, index: int) -> Prompt | None:
        """The prompt of one example; None where it is left out: nothing is asked, or it is longer than allowed.

        Raises:
            ConfigError: a template fails (which row, which error).
        """
        self.counts["rows"] += 1
        if not example.question.strip():
            self.counts["empty"] += 1
            return None
        asked = example
        if self.opening is not None:
            try:
                asked = replace(example, question=self.opening(example))
            except Exception as error:  # an environment may be the user's code, too
                self.counts["refused"] += 1
                self.refusal = f"row {index}: {error}"
                return None
        try:
            token_ids = self._fit(asked, self.student_ids, self.max_tokens)
            teacher_ids = None
            if token_ids and self.has_teacher_prompt:
                teacher_ids = self._fit(asked, self.teacher_ids, self.teacher_max_tokens)
        except Exception as error:  # a template is the user's code: it raises what it likes
            raise ConfigError(
                f"row {index}: the prompt's template failed: {type(error).__name__}: {error}; mend the row, or the "
                "template (model.chat_template, else the tokenizer's own)"
            ) from error
        if not token_ids or (self.has_teacher_prompt and not teacher_ids):
            self.counts["long"] += 1
            return None
        return Prompt(index, token_ids, example, teacher_token_ids=teacher_ids)

    def student_ids(self, example: Example, *, cut: int | None = None) -> list[int]:
        """Token ids, with the question cut to `cut` characters where that is given."""
        question = example.question if cut is None else example.question[:cut]
        text = _fill(self.data.prompt_template, question=question)
        return self._render(example, text, self.template_kwargs, None)

    def teacher_ids(self, example: Example, *, cut: int | None = None) -> list[int]:
        """Token ids of what the teacher reads; what is cut is its context, where it has one."""
        question, context = example.question, example.context
        if cut is not None:
            question, context = (question[:cut], None) if context is None else (question, context[:cut])
        text = _fill(self.data.prompt_template, question=question)
        if context is not None:
            text = _fill(self.data.teacher_prompt_template, question=text, context=context)
        return self._render(example, text, self.teacher_kwargs, self.teacher_template)

    def _fit(self, example: Example, ids_of: Any, limit: int) -> list[int]:
        """Token ids, at most `limit`; empty where there are more and `data.overlong_prompts` drops them."""
        cuts = self.data.overlong_prompts is OverlongPrompts.truncate
        part = example.context if ids_of == self.teacher_ids and example.context is not None else example.question
        most = limit * MAX_TOKEN_CHARACTERS
        if len(part) > most and not cuts:
            return []
        ids = ids_of(example, cut=most if len(part) > most else None)
        if len(ids) <= limit or not cuts:
            return ids if len(ids) <= limit else []
        low, high = 0, min(len(part), most)  # the longest beginning that fits, by halving
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(ids_of(example, cut=middle)) <= limit else (low, middle - 1)
        if low == 0:
            return []
        self.counts["cut"] += 1
        return ids_of(example, cut=low)

    def _render(
        self, example: Example, text: str, template_kwargs: Mapping[str, Any], template: str | None
    ) -> list[int]:
        """`text` as the user's last message, after what came before it."""
        system = self.data.system_prompt
        if self.tokenizer.chat_template is None and template is None:
            said = [message["content"] for message in example.messages[:-1]]
            return self.tokenizer.encode("\n\n".join([*([system] if system else []), *said, text]))
        messages = [*(dict(message) for message in example.messages[:-1]), {"role": "user", "content": text}]
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def warnings(self) -> list[str]:
        """One line for each way in which prompts were not taken as they are."""
        rows, limit = self.counts["rows"], self.max_tokens
        said = {
            "empty": "ask nothing and are left out",
            "refused": f"are refused by the environment and left out; the last: {self.refusal}",
            "long": f"are longer than {limit} tokens (the teacher's than {self.teacher_max_tokens}) and left out"
            if self.has_teacher_prompt
            else f"are longer than {limit} tokens and left out",
            "cut": f"are cut to {limit} tokens"
            + (f", the teacher's to {self.teacher_max_tokens}" if self.has_teacher_prompt else ""),
        }
        return [f"{self.counts[what]} of {rows} prompts {words}" for what, words in said.items() if self.counts[what]]


def _fill(template: str, **parts: str) -> str:
    """The template with each `{name}` replaced; braces in what is put there stay as they are."""
    return re.sub("{(" + "|".join(parts) + ")}", lambda found: parts[found[1]], template)


def make_prompts(examples: Iterable[Example], make: PromptMaker, *, key: str, limit: int | None = None) -> list[Prompt]:
    """All prompts, or the first `limit`; what is left out or cut is counted in a warning.

    Raises:
        ConfigError: none is left, or a template fails.
    """
    prompts = []
    for index, example in enumerate(examples):
        try:
            prompt = make(example, index)
        except ConfigError as error:
            raise ConfigError(f"{key}, {error}") from error
        if prompt is not None:
            prompts.append(prompt)
            if len(prompts) == limit:
                break
    if not prompts:
        counts = make.counts
        if counts["refused"]:
            raise ConfigError(
                f"{key}: no prompt is left of {counts['rows']}: the environment refuses {counts['refused']}; the last: "
                f"{make.refusal}"
            )
        raise ConfigError(
            f"{key}: no prompt is left of {counts['rows']}: {counts['empty']} ask nothing and {counts['long']} are "
            f"longer than {make.max_tokens} tokens (data.max_prompt_tokens; else what rollout.max_new_tokens leaves of "
            "rollout.max_sequence_length); raise it, or choose data.overlong_prompts=truncate"
        )
    for warning in make.warnings():
        log.warning("%s: %s", key, warning)
    return prompts
