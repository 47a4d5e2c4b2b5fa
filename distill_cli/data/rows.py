"""Rows of named columns become examples: one row at a time, when it is asked for.

A table that is on disk is read by row number and never held whole; a stream is read from its beginning, any number of
times. Sources return either, or a plain list.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.types import Example

log = logging.getLogger(__name__)

FINAL_MARK = "####"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; a dot goes into a nested one (`reward_model.ground_truth`)."""

    question: str | None = None
    answer: str | None = None
    messages: str | None = None
    """A conversation in place of a question: a list of `role` and `content`."""
    context: str | None = None
    response: str | None = None
    answer_from: str | None = None
    """How the answer is found in its column: one of ANSWERS; None takes all of it."""
    dataset: str = ""

    def __post_init__(self) -> None:
        if self.answer_from is not None and self.answer_from not in ANSWERS:
            raise ConfigError(f"answer_from={self.answer_from}: must be one of {', '.join(ANSWERS)}, or null")

    @property
    def named(self) -> dict[str, str]:
        """The key of a source that names each column that is asked for."""
        asked = {
            "question_key": None if self.messages else self.question,
            "messages_key": self.messages,
            "answer_key": self.answer,
            "context_key": self.context,
            "response_key": self.response,
        }
        return {key: column for key, column in asked.items() if column is not None}

    def check(self, known: Sequence[str], *, where: str) -> None:
        """Raises ConfigError where a column is missing, with those that are there."""
        missing = [f"{key}={column}" for key, column in self.named.items() if column.split(".")[0] not in known]
        if missing:
            raise ConfigError(f"{where}: no such column: {', '.join(missing)}; there are: {', '.join(known) or 'none'}")

    def to_example(self, row: Mapping[str, Any], *, where: str) -> Example:
        """One row. A row without a question, or without words in it, gives a blank one, which is left out later.

        Raises:
            ConfigError: a column is missing or of another type (`where` says which row).
        """
        messages, response = (), _text(row, self.response, where)
        if self.messages is not None:
            messages, said = _conversation(_value(row, self.messages, where), f"{where}: {self.messages}")
            question, response = messages[-1]["content"] if messages else "", response or said
        else:
            question = _value(row, self.question, where)
            if question is not None and not isinstance(question, str):
                raise ConfigError(f"{where}: {self.question} must be a text, not {_shown(question)}")
        answer, context = _text(row, self.answer, where), _text(row, self.context, where)
        if answer is not None and self.answer_from is not None:
            answer = ANSWERS[self.answer_from](answer)
        return Example(
            question=question or "",
            answer=answer,
            dataset=self.dataset,
            messages=messages if len(messages) > 1 else (),
            context=context if context and context.strip() else None,
            response=response,
        )


class Table(Sequence[Example]):
    """Examples of rows that are read by number."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Columns,
        *,
        where: str,
        lines: Sequence[int] | None = None,
        repeat: int = 1,
    ) -> None:
        """`lines` are the rows' lines in a file, for messages; `repeat` is how often the whole table follows itself."""
        self.rows, self.columns, self.where, self.lines, self.repeat = rows, columns, where, lines, repeat

    def __len__(self) -> int:
        return len(self.rows) * self.repeat

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self.rows)
        return self._example(index, self.rows[index])

    def __iter__(self) -> Iterator[Example]:
        for _ in range(self.repeat):  # reading in order is many times faster than by number
            for index, row in enumerate(self.rows):
                yield self._example(index, row)

    def _example(self, index: int, row: Mapping[str, Any]) -> Example:
        place = f"{self.where}:{self.lines[index]}" if self.lines else f"{self.where}, row {index}"
        return self.columns.to_example(row, where=place)


@dataclass(frozen=True)
class Stream:
    """Examples that can only be read from the first one on; nobody knows how many there are."""

    read: Callable[[], Iterator[Example]]

    def __iter__(self) -> Iterator[Example]:
        return self.read()


def or_blank(make: Callable[[], Example]) -> Example:
    """The example, or a blank one, with a warning, where its row is wrong: a run does not end for a row found late."""
    try:
        return make()
    except ConfigError as error:
        log.warning("%s; the row is left out", error)
        return Example("")


def final_answer(text: str) -> str | None:
    """What follows the last `####`, without thousands' commas, as GSM8K has it; None where there is none."""
    _, mark, said = text.rpartition(FINAL_MARK)
    return re.sub(r"(?<=\d),(?=\d{3})", "", said).strip() if mark else None


def boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced, as MATH has it; None where there is none."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin, depth = begin + len("\\boxed{"), 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return text[begin:].strip()


ANSWERS: dict[str, Callable[[str], str | None]] = {"final": final_answer, "boxed": boxed_answer}


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(repr, value if isinstance(value, Mapping) else row))
            raise ConfigError(f"{where}: no column {column!r}; this row has: {there or 'none'}")
        value = value[part]
    return value


def _text(row: Mapping[str, Any], column: str | None, where: str) -> str | None:
    value = None if column is None else _value(row, column, where)
    if value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: {column} must be a text or a number, not {_shown(value)}")
    return None if value is None else str(value)


def _conversation(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    """The messages up to the user's last, and what the assistant said after it."""
    if value is None:
        return (), None
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ConfigError(f"{where} must be a list of messages, not {_shown(value)}")
    messages = []
    for message in value:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ConfigError(
                f"{where}: each message needs a role ({', '.join(ROLES)}) and a content that is a text, not "
                f"{_shown(message)}"
            )
        messages.append({"role": role, "content": content})
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        return (), None
    after = [message["content"] for message in messages[users[-1] + 1 :] if message["role"] == "assistant"]
    return tuple(messages[: users[-1] + 1]), after[-1] if after else None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
