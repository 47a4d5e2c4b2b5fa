"""A JSON-lines file: one object a line.

{"question": "What is 3 + 4?", "answer": "7"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.types import Example


def load(*, path: str, question_key: str = "question", answer_key: str | None = "answer") -> list[Example]:
    """Every row of the file; blank lines are skipped.

    Args:
        answer_key: null where the rows carry no answers to check.

    Raises:
        ConfigError: the file is missing or empty, or a line is no JSON object with these keys (file and line).
    """
    file = Path(path)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    examples = [
        _example(line, f"{path}:{number}", question_key, answer_key)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise ConfigError(f"{path}: the file has no rows")
    return examples


def _example(line: bytes, where: str, question_key: str, answer_key: str | None) -> Example:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON {type(row).__name__}, where an object is needed")
    question = _value(row, question_key, where)
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{where}: {question_key} must be a text that is not empty, not {question!r}")
    answer = _value(row, answer_key, where) if answer_key is not None else None
    if answer is not None and not isinstance(answer, str | int | float):
        raise ConfigError(f"{where}: {answer_key} must be a text or a number, not {answer!r}")
    return Example(question=question, answer=None if answer is None else str(answer))


def _value(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise ConfigError(f"{where}: no key {key!r}; this row has: {', '.join(map(repr, row)) or 'none'}")
    return row[key]
