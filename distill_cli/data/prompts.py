"""Turn examples into prompts: apply the templates and tokenize, for the student and, if it reads another, the teacher.

Response tokens are shared, prompts need not be: the teacher may have a chat template of its own (`model.teacher`), or
read a context that the student does not (`data.teacher_context`).
"""

import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill_cli.errors import ConfigError
from distill_cli.models.model_pair import OWN_TEMPLATE, read_template
from distill_cli.types import Example, Prompt

log = logging.getLogger(__name__)

MAX_TOKEN_CHARACTERS = 256
"""No tokenizer's tokens are this long on average: reject a longer text without tokenizing it."""


def load_tokenizer(
    folder: Path, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer; `chat_template`, a Jinja file or the template itself, replaces its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if tokenizer.chat_template is None:
        log.warning("the tokenizer has no chat template: prompts are the plain text of data.prompt_template")
    return tokenizer


def load_template(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Return a model's own chat template. Raises ConfigError if it has none."""
    template = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code).chat_template
    if template is None:
        raise ConfigError(f"model.teacher.chat_template={OWN_TEMPLATE}: {folder} has no chat template; give one")
    return template


@dataclass(frozen=True)
class PromptSettings:
    """How an example becomes the student's prompt, and the teacher's."""

    max_tokens: int
    """Most tokens of the student's prompt."""
    prompt_template: str = "{question}"
    """The user's message; `{question}` stands for the example's question."""
    system_prompt: str | None = None
    """The system message of conversations that bring none of their own."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Drop a prompt that is too long, or truncate its question (of the teacher's, its context)."""
    teacher_max_tokens: int | None = None
    """Most tokens of the teacher's prompt; None is `max_tokens`."""
    teacher_chat_template: str | None = None
    """The text of the teacher's chat template; None is the student's."""
    teacher_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the teacher's chat template, in addition to `template_kwargs` and overriding them."""
    has_teacher_context: bool = False
    """Whether examples have a context, which only the teacher reads."""
    teacher_prompt_template: str = "{question}\n\nA reference solution, for you alone:\n\n{context}"
    """The teacher's user message if it has a context; `{question}` stands for the student's user message."""

    @property
    def teacher_kwargs(self) -> Mapping[str, Any]:
        return {**self.template_kwargs, **self.teacher_template_kwargs}

    @property
    def has_teacher_prompt(self) -> bool:
        """Whether the teacher's prompt may differ from the student's."""
        has_own_template = self.teacher_chat_template is not None or self.teacher_kwargs != self.template_kwargs
        return self.has_teacher_context or has_own_template


Opening = Callable[[Example], str]


class PromptMaker:
    """Make prompts of examples, and count those that are left out or truncated."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, *, opening: Opening | None = None
    ) -> None:
        """
        Args:
            opening: returns an environment's first message, which replaces the example's question.
        """
        self.tokenizer, self.settings, self.opening = tokenizer, settings, opening
        self.teacher_max_tokens = settings.teacher_max_tokens or settings.max_tokens
        self.counts: Counter[str] = Counter()
        self.refusal = ""
        """The environment's error on the last row that it refused."""

    def __call__(self, example: Example, index: int) -> Prompt | None:
        """Return the prompt of one example, or None to leave it out: its question is blank, or it is too long.

        Raises:
            ConfigError: a template fails (which row, which error).
        """
        self.counts["rows"] += 1
        if not example.question.strip():
            self.counts["empty"] += 1
            return None
        try:
            opened = replace(example, question=self.opening(example)) if self.opening else example
        except Exception as error:  # an environment may be the user's code, too
            self.counts["refused"] += 1
            self.refusal = f"row {index}: {error}"
            return None
        try:
            token_ids, teacher_ids = self._fit(opened, self.student_ids, self.settings.max_tokens), None
            if token_ids and self.settings.has_teacher_prompt:
                teacher_ids = self._fit(opened, self.teacher_ids, self.teacher_max_tokens)
        except Exception as error:  # a template is the user's code and may raise anything
            what = f"row {index}: the prompt's template failed: {type(error).__name__}: {error}"
            raise ConfigError(f"{what}; mend the row, or the template (model.chat_template)") from error
        if not token_ids or teacher_ids == []:
            self.counts["long"] += 1
            return None
        return Prompt(index, token_ids, example, teacher_token_ids=teacher_ids)

    def student_ids(self, example: Example, cut: int) -> list[int]:
        """Return the token ids of the student's prompt, with the question cut to `cut` characters."""
        text = _fill(self.settings.prompt_template, question=example.question[:cut])
        return self._render(example, text, self.settings.template_kwargs, None)

    def teacher_ids(self, example: Example, cut: int) -> list[int]:
        """Return the token ids of the teacher's prompt, with the context cut, or the question if there is none."""
        if example.context is None:
            text = _fill(self.settings.prompt_template, question=example.question[:cut])
        else:
            question = _fill(self.settings.prompt_template, question=example.question)
            text = _fill(self.settings.teacher_prompt_template, question=question, context=example.context[:cut])
        return self._render(example, text, self.settings.teacher_kwargs, self.settings.teacher_chat_template)

    def _fit(self, example: Example, ids_of: Callable[[Example, int], list[int]], limit: int) -> list[int]:
        """Return at most `limit` token ids; none if there are more and `overlong` is drop, or nothing fits."""
        part = example.context if ids_of == self.teacher_ids and example.context is not None else example.question
        longest = min(len(part), limit * MAX_TOKEN_CHARACTERS)
        if self.settings.overlong == "drop":
            ids = ids_of(example, longest) if longest == len(part) else []
            return ids if len(ids) <= limit else []
        if len(ids := ids_of(example, longest)) <= limit:
            return ids
        cut = longest - bisect_left(range(longest, 0, -1), True, key=lambda cut: len(ids_of(example, cut)) <= limit)
        self.counts["cut"] += cut > 0
        return ids_of(example, cut) if cut else []

    def _render(
        self, example: Example, text: str, template_kwargs: Mapping[str, Any], template: str | None
    ) -> list[int]:
        """Render `text` as the user's last message, after the example's earlier messages."""
        system = self.settings.system_prompt
        if self.tokenizer.chat_template is None and template is None:
            earlier = [message["content"] for message in example.messages[:-1]]
            return self.tokenizer.encode("\n\n".join([*([system] if system else []), *earlier, text]))
        messages = [*(dict(message) for message in example.messages[:-1]), {"role": "user", "content": text}]
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def warnings(self) -> list[str]:
        """Return one line for each way in which prompts were left out or truncated."""
        teacher = f" (the teacher's: {self.teacher_max_tokens})" if self.settings.has_teacher_prompt else ""
        limit = f"{self.settings.max_tokens} tokens{teacher}"
        reasons = {
            "empty": "have no question and are left out",
            "refused": f"are refused by the environment and left out; the last: {self.refusal}",
            "long": f"are longer than {limit} and left out",
            "cut": f"are truncated to {limit}",
        }
        counts = self.counts
        return [f"{counts[key]} of {counts['rows']} prompts {why}" for key, why in reasons.items() if counts[key]]


def _fill(template: str, **parts: str) -> str:
    """Replace each `{name}` of the template; braces in the replacements stay as they are."""
    return re.sub("{(" + "|".join(parts) + ")}", lambda match: parts[match[1]], template)


def make_prompts(examples: Iterable[Example], make: PromptMaker, *, key: str, limit: int | None = None) -> list[Prompt]:
    """Make all prompts, or the first `limit`; a warning counts those that are left out or truncated.

    Raises:
        ConfigError: no prompt is left, or a template fails.
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
        raise ConfigError(
            f"{key}: no prompt is left: {'; '.join(make.warnings())}. If too long, raise data.max_prompt_tokens "
            "(default: rollout.max_sequence_length - rollout.max_new_tokens), or set data.overlong_prompts=truncate"
        )
    for warning in make.warnings():
        log.warning("%s: %s", key, warning)
    return prompts
