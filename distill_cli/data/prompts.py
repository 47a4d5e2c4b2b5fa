"""Turn examples into prompts: apply the templates and tokenize, for the student and, if it reads another, the teacher.

The answer's text is shared, prompts need not be: the teacher may have a tokenizer or a chat template of its own
(`model.teacher`), or read a context that the student does not (`data.teacher_context`).
"""

import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill_cli.data.routing import asked_for, route
from distill_cli.errors import ConfigError
from distill_cli.models.model_pair import OWN_TEMPLATE, read_template
from distill_cli.types import Example, Prompt, Target

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
class TeacherPromptSettings:
    """How an example becomes a teacher's prompt."""

    name: str = "teacher"
    tokenizer: PreTrainedTokenizerBase | None = None
    """Its own, with its own chat template; None is the student's."""
    max_tokens: int | None = None
    """Most tokens of its prompt; None is the student's limit."""
    chat_template: str | None = None
    """The text of its chat template; None is its tokenizer's."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its chat template, in addition to the student's and overriding them."""
    has_context: bool = False
    """Whether it reads the examples' contexts."""
    prompt_template: str = "{question}\n\nA reference solution, for you alone:\n\n{context}"
    """The user message if the example has a context; `{question}` stands for the student's user message."""


@dataclass(frozen=True)
class PromptSettings:
    """How an example becomes the student's prompt, and those of its teachers."""

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
    teachers: tuple[TeacherPromptSettings, ...] = (TeacherPromptSettings(),)
    """Those of the run, in the config's order."""
    mixes: bool = True
    """Whether an example may have several teachers: they need one temperature, a top-k, and the student's tokenizer."""

    def kwargs_of(self, teacher: TeacherPromptSettings) -> Mapping[str, Any]:
        """Return the arguments of a teacher's chat template."""
        return {**self.template_kwargs, **teacher.template_kwargs}

    def limit_of(self, teacher: TeacherPromptSettings) -> int:
        """Return the most tokens of a teacher's prompt."""
        return teacher.max_tokens or self.max_tokens

    def has_own_prompt(self, teacher: TeacherPromptSettings) -> bool:
        """Return whether a teacher's prompt may differ from the student's."""
        has_own_template = teacher.chat_template is not None or self.kwargs_of(teacher) != self.template_kwargs
        return teacher.tokenizer is not None or teacher.has_context or has_own_template


Opening = Callable[[Example], str]


class PromptMaker:
    """Make prompts of examples, and count those that are left out or truncated."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptSettings,
        *,
        opening: Opening | None = None,
        is_scored: bool = True,
    ) -> None:
        """
        Args:
            opening: returns an environment's first message, which replaces the example's question.
            is_scored: leave out examples that ask for no known teacher; else they have all teachers equally.
        """
        self.is_scored = is_scored
        self.tokenizer, self.settings, self.opening = tokenizer, settings, opening
        self.counts: Counter[str] = Counter()
        self.last: dict[str, str] = {}
        """What was wrong with the last row that was left out, by reason."""

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
            self.last["refused"] = f"row {index}: {error}"
            return None
        weights = route(example, [teacher.name for teacher in self.settings.teachers])
        if not weights and self.is_scored:
            self.counts["unknown"] += 1
            self.last["unknown"] = f"row {index}: {asked_for(example)}"
            return None
        if len(weights) > 1 and not self.settings.mixes:
            self.counts["mixed"] += 1
            return None
        number = len(self.settings.teachers)
        weights = weights or dict.fromkeys(range(number), 1 / number)
        try:
            token_ids = self._fit(opened, self.student_ids, self.settings.max_tokens)
            targets = self._targets(opened, weights) if token_ids else ()
        except Exception as error:  # a template is the user's code and may raise anything
            what = f"row {index}: the prompt's template failed: {type(error).__name__}: {error}"
            raise ConfigError(f"{what}; mend the row, or the template (model.chat_template)") from error
        if not token_ids or any(target.token_ids == [] for target in targets):
            self.counts["long"] += 1
            return None
        return Prompt(index, token_ids, example, targets)

    def _targets(self, example: Example, weights: Mapping[int, float]) -> tuple[Target, ...]:
        """Return the teachers with these weights, each with its prompt; an empty one does not fit."""
        targets = []
        for index, weight in sorted(weights.items()):
            teacher, ids = self.settings.teachers[index], None
            if self.settings.has_own_prompt(teacher):
                ids_of = partial(self.teacher_ids, teacher)
                cuts_context = teacher.has_context and example.context is not None
                ids = self._fit(example, ids_of, self.settings.limit_of(teacher), cuts_context=cuts_context)
            targets.append(Target(index, weight, ids))
        return tuple(targets)

    def student_ids(self, example: Example, cut: int) -> list[int]:
        """Return the token ids of the student's prompt, with the question cut to `cut` characters."""
        text = _fill(self.settings.prompt_template, question=example.question[:cut])
        return self._render(example, text, self.settings.template_kwargs)

    def teacher_ids(self, teacher: TeacherPromptSettings, example: Example, cut: int) -> list[int]:
        """Return the token ids of a teacher's prompt, with the context cut, or the question if it reads none."""
        if example.context is None or not teacher.has_context:
            text = _fill(self.settings.prompt_template, question=example.question[:cut])
        else:
            question = _fill(self.settings.prompt_template, question=example.question)
            text = _fill(teacher.prompt_template, question=question, context=example.context[:cut])
        return self._render(
            example, text, self.settings.kwargs_of(teacher), teacher.chat_template, tokenizer=teacher.tokenizer
        )

    def _fit(
        self,
        example: Example,
        ids_of: Callable[[Example, int], list[int]],
        limit: int,
        *,
        cuts_context: bool = False,
    ) -> list[int]:
        """Return at most `limit` token ids; none if there are more and `overlong` is drop, or nothing fits."""
        part = (example.context or "") if cuts_context else example.question
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
        self,
        example: Example,
        text: str,
        template_kwargs: Mapping[str, Any],
        template: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[int]:
        """Render `text` as the user's last message, after the example's earlier messages."""
        system, tokenizer = self.settings.system_prompt, tokenizer or self.tokenizer
        if tokenizer.chat_template is None and template is None:
            earlier = [message["content"] for message in example.messages[:-1]]
            return tokenizer.encode("\n\n".join([*([system] if system else []), *earlier, text]))
        messages = [*(dict(message) for message in example.messages[:-1]), {"role": "user", "content": text}]
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return tokenizer.encode(rendered, add_special_tokens=False)

    def warnings(self) -> list[str]:
        """Return one line for each way in which prompts were left out or truncated."""
        settings = self.settings
        own = {teacher.name: settings.limit_of(teacher) for teacher in settings.teachers}
        has_own = any(map(settings.has_own_prompt, settings.teachers))
        limits = ", ".join(f"{name}: {limit}" for name, limit in own.items())
        if len(own) == 1:
            limits = f"the teacher's: {limits.rpartition(' ')[2]}"
        limit = f"{settings.max_tokens} tokens" + (f" ({limits})" if has_own else "")
        names = ", ".join(own)
        reasons = {
            "empty": "have no question and are left out",
            "refused": f"are refused by the environment and left out; the last: {self.last.get('refused')}",
            "mixed": "ask for several teachers, which need one temperature, a top-k and one tokenizer: left out",
            "unknown": f"ask for no known teacher ({names}) and are left out; the last: {self.last.get('unknown')}",
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
