"""Convert rows of named columns to examples, lazily.

A table on disk is read by row number and never held whole; a stream is read from its beginning, any number of times.
Sources return either, or a plain list.
"""

import logging
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.types import Example

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
QUESTIONS = ("prompt", "question", "instruction", "problem", "query", "input", "text")
"""Usual names of a column of prompts, the likeliest first."""
CONVERSATIONS = ("messages", "conversation", "chat")
"""Usual names of a column of conversations."""


NO_ANSWERS = "; for prompts without answers to check, choose data=prompts, or set answer_key=null"


@dataclass(frozen=True)
class Columns:
    """The column that each key of a source names; a dot goes into a nested one (`reward_model.ground_truth`)."""

    question_key: str | None
    """None is the first of QUESTIONS that is there, or, where it holds messages or is missing, of CONVERSATIONS."""
    messages_key: str | None = None
    """A conversation in place of a question: a list of `role` and `content`."""
    answer_key: str | None = None
    context_key: str | None = None
    response_key: str | None = None
    answer_from: str | None = None
    """Where in its column the answer stands: one of ANSWERS; None takes all of the text."""
    dataset: str = ""
    teacher_key: str | None = None

    def __post_init__(self) -> None:
        if self.answer_from is not None and self.answer_from not in ANSWERS:
            raise ConfigError(f"answer_from={self.answer_from}: must be one of {', '.join(ANSWERS)}, or null")

    @property
    def named(self) -> dict[str, str]:
        """Return {key: column} of the columns that are read."""
        columns = {key: column for key, column in vars(self).items() if key.endswith("_key") and column is not None}
        if self.messages_key:
            columns.pop("question_key", None)
        return columns

    def found_in(self, row: Mapping[str, Any], *, where: str) -> "Columns":
        """Return the columns with that of the question, by the first row. Raises ConfigError if there is none."""
        if self.question_key is not None or self.messages_key is not None:
            return self
        for name in (*QUESTIONS, *CONVERSATIONS):
            if isinstance(row.get(name), str):
                return replace(self, question_key=name)
            if isinstance(row.get(name), list):
                return replace(self, messages_key=name)
        fix = f"give question_key or messages_key, or name it {QUESTIONS[0]}"
        raise ConfigError(f"{where}: no column of prompts; there are: {', '.join(row) or 'none'}; {fix}")

    def check(self, known: Sequence[str], *, where: str) -> None:
        """Raise ConfigError if a column is missing, and name those that exist."""
        missing = [f"{key}={column}" for key, column in self.named.items() if column.split(".")[0] not in known]
        if missing:
            fix = NO_ANSWERS if self.answer_key is not None and missing == [f"answer_key={self.answer_key}"] else ""
            there = ", ".join(known) or "none"
            raise ConfigError(f"{where}: no such column: {', '.join(missing)}; there are: {there}{fix}")

    def to_example(self, row: Mapping[str, Any], *, where: str) -> Example:
        """Return a row's example; its question is blank if the row has none, and is left out later.

        Raises:
            ConfigError: a column is missing or of another type (`where` names the row).
        """
        messages: tuple[dict[str, str], ...] = ()
        response = _text(row, self.response_key, where)
        if self.messages_key is not None:
            value = _value(row, self.messages_key, where)
            messages, last_answer = _conversation(value, f"{where}: {self.messages_key}")
            question, response = messages[-1]["content"] if messages else "", response or last_answer
        else:
            assert self.question_key is not None, "found_in comes first"
            if "." not in self.question_key and self.question_key not in row:
                fix = "name the column by question_key, or choose data=prompts, which finds it"
                raise ConfigError(f"{where}: no column {self.question_key!r}; this row has: {_names(row)}; {fix}")
            question = _value(row, self.question_key, where)
            if question is not None and not isinstance(question, str):
                raise ConfigError(f"{where}: {self.question_key} must be a text, not {_shown(question)}")
        if self.answer_key is not None and "." not in self.answer_key and self.answer_key not in row:
            raise ConfigError(f"{where}: no column {self.answer_key!r}; this row has: {_names(row)}{NO_ANSWERS}")
        answer, context = _text(row, self.answer_key, where), _text(row, self.context_key, where)
        if answer is not None and self.answer_from is not None:
            answer = ANSWERS[self.answer_from](answer)
        return Example(
            question=question or "",
            answer=answer,
            dataset=self.dataset,
            messages=messages if len(messages) > 1 else (),
            context=context if context and context.strip() else None,
            response=response,
            teachers=_teachers(row, self.teacher_key, where),
        )


@dataclass(eq=False, repr=False)
class Table(Sequence[Example]):
    """Examples of rows that are read by number; the whole table follows itself `repeat` times."""

    rows: Sequence[Mapping[str, Any]]
    columns: Columns
    where: str
    repeat: int = 1

    def __len__(self) -> int:
        return len(self.rows) * self.repeat

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self.rows)
        return self.columns.to_example(self.rows[index], where=f"{self.where}, row {index}")

    def __iter__(self) -> Iterator[Example]:
        for _ in range(self.repeat):  # reading in order is many times faster than by number
            for index, row in enumerate(self.rows):
                yield self.columns.to_example(row, where=f"{self.where}, row {index}")


@dataclass(frozen=True)
class Stream:
    """Examples that can only be read from the first one on, and whose number is unknown."""

    read: Callable[[], Iterator[Example]]

    def __iter__(self) -> Iterator[Example]:
        return self.read()


def or_blank(make: Callable[[], Example]) -> Example:
    """Return the example, or warn and return a blank one if its row is wrong: a row found late must not end a run."""
    try:
        return make()
    except ConfigError as error:
        log.warning("%s; the row is left out", error)
        return Example("")


def final_answer(text: str) -> str | None:
    """Return what follows the last `####`, without thousands' commas, as GSM8K has it; None if there is no mark."""
    _, mark, rest = text.rpartition("####")
    return re.sub(r"(?<=\d),(?=\d{3})", "", rest).strip() if mark else None


def boxed_answer(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, braces balanced, as MATH has it; None if there is none."""
    _, box, rest = text.rpartition("\\boxed{")
    if not box:
        return None
    depth = 1
    for end, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end].strip()
    return rest.strip()


ANSWERS: dict[str, Callable[[str], str | None]] = {"final": final_answer, "boxed": boxed_answer}


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = _names(value if isinstance(value, Mapping) else row)
            raise ConfigError(f"{where}: no column {column!r}; this row has: {there}")
        value = value[part]
    return value


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _text(row: Mapping[str, Any], column: str | None, where: str) -> str | None:
    value = None if column is None else _value(row, column, where)
    if value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: {column} must be a text or a number, not {_shown(value)}")
    return None if value is None else str(value)


def _teachers(row: Mapping[str, Any], column: str | None, where: str) -> tuple[tuple[str, float], ...]:
    """Return the teachers of a row with weights that add up to 1: one name, a list of names, or names with weights."""
    value = None if column is None else _value(row, column, where)
    named = {value: 1.0} if isinstance(value, str) and value else value
    if isinstance(named, list) and all(isinstance(name, str) for name in named):
        named = dict.fromkeys(named, 1.0)
    if not named:
        return ()
    # A table fills in null for the names that another row has.
    weights = {name: weight or 0.0 for name, weight in named.items()} if isinstance(named, dict) else {}
    if not weights or not all(map(_is_weight, weights.values())) or not sum(weights.values()):
        rule = "must be a name, a list of names, or an object of names and weights of at least 0, some above"
        raise ConfigError(f"{where}: {column} {rule}, not {_shown(value)}")
    total = sum(weights.values())
    return tuple((str(name), weight / total) for name, weight in weights.items() if weight)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _conversation(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    """Return the messages up to the user's last, and the assistant's last answer to that one."""
    if not isinstance(value, list | None):
        raise ConfigError(f"{where} must be a list of messages, not {_shown(value)}")
    messages = []
    for message in value or ():
        match message:
            case {"role": role, "content": str(content)} if role in ROLES:
                messages.append({"role": role, "content": content})
            case _:
                roles = ", ".join(ROLES)
                raise ConfigError(f"{where}: each message needs a role ({roles}) and a text, not {_shown(message)}")
    num = max((number for number, message in enumerate(messages, start=1) if message["role"] == "user"), default=0)
    answers = [message["content"] for message in messages[num:] if num and message["role"] == "assistant"]
    return tuple(messages[:num]), answers[-1] if answers else None


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
