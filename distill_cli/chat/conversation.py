"""One model's conversation: what it reads for the next message, and its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_cli.data.prompts import PromptMaker
from distill_cli.errors import ConfigError
from distill_cli.types import Example, Sample

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A message as the model reads it."""

    example: Example
    """The message as it was typed, at the end of the conversation's messages."""
    prompt_ids: list[int]
    """The whole conversation as the template renders it."""


@dataclass(frozen=True)
class Turn:
    """A message and its answer."""

    question: Question
    sample: Sample
    answer: str
    """The text of `sample`, without special tokens."""


@dataclass
class Conversation:
    """A conversation with one model, as its chat template renders it anew for each message."""

    make: PromptMaker
    """Renders messages; its settings have no system prompt."""
    context: int
    """Tokens of the model's longest sequence."""
    raise_context: str
    """The key that raises `context`, and what the model allows."""
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template; without one each message is a text to complete, on its own."""
        return self.make.tokenizer.chat_template is not None

    def render(self, text: str) -> Question:
        """Return what the model reads before it answers the next message.

        Raises:
            ConfigError: the template fails, or the context is full.
        """
        messages = [*self._messages(), {"role": "user", "content": text}]
        example = Example(text, messages=tuple(messages))
        try:
            ids = self.make.student_ids(example, len(text))
        except Exception as error:  # a template is the user's code and may raise anything
            what = f"the chat template fails: {type(error).__name__}: {error}"
            raise ConfigError(f"{what}; begin anew with /reset, or without a system prompt (/system)") from error
        if len(ids) >= self.context:
            full = f"the conversation has {len(ids)} tokens with this message, and the context {self.context}"
            fix = "begin a new one with /reset" if self.turns else "shorten it"
            raise ConfigError(f"{full}: nothing was cut, and nothing is answered; {fix}, or {self.raise_context}")
        return Question(example, ids)

    def _messages(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        earlier = [message for turn in self.turns for message in self._messages_of(turn)] if self.has_template else []
        return [*system, *earlier]

    def _messages_of(self, turn: Turn) -> list[Message]:
        user = self.make.settings.prompt_template.replace("{question}", turn.question.example.question)
        return [{"role": "user", "content": user}, {"role": "assistant", "content": turn.answer}]

    def rows(self, model: str) -> list[dict[str, Any]]:
        """Return each turn as a row of data: `question` and `answer`, and the conversation as `messages`."""
        return [
            {
                "question": turn.question.example.question,
                "answer": turn.answer,
                "messages": [*turn.question.example.messages, {"role": "assistant", "content": turn.answer}],
                "model": model,
            }
            for turn in self.turns
        ]


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines. Raises ConfigError if the file exists, cannot be written, or there is nothing."""
    if not rows:
        raise ConfigError("/save: nothing was answered yet; ask something first")
    try:
        with path.expanduser().open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise ConfigError(f"/save {path}: exists already; give another name") from None
    except OSError as error:
        raise ConfigError(f"/save {path}: cannot be written ({error.strerror}); give another name") from error


class TextStream:
    """The text of tokens as they come. Bytes of a character wait for the rest of it."""

    MOST_WAITING = 8
    """Tokens that wait, at most: what is no character by then is none."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode, self._ids = decode, list[int]()
        self._begin = self._shown = 0
        """The first token that is decoded with the next ones, as spaces depend on those before; and the first that is
        not shown yet."""

    def add(self, token_ids: Sequence[int], *, is_last: bool = False) -> str:
        """Return the text that these tokens complete."""
        self._ids += token_ids
        before, text = self._decode(self._ids[self._begin : self._shown]), self._decode(self._ids[self._begin :])
        waits = text.endswith("\ufffd") and len(self._ids) - self._shown < self.MOST_WAITING
        if len(text) <= len(before) or (waits and not is_last):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text[len(before) :]
