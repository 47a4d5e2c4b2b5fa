"""A JSON-lines file: one object a line.

{"question": "What is 3 + 4?", "answer": "7"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill_cli.data.rows import Columns, Table
from distill_cli.errors import ConfigError
from distill_cli.types import Example


def load(
    *,
    path: str,
    question_key: str = "question",
    answer_key: str | None = "answer",
    context_key: str | None = None,
    response_key: str | None = None,
) -> Sequence[Example]:
    """Every row of the file; blank lines are skipped.

    Args:
        answer_key: null where the rows carry no answers to check.
        context_key: what only the teacher sees; `data.teacher_context` sets it.
        response_key: a whole answer to imitate.

    Raises:
        ConfigError: the file is missing or empty, or a line is no JSON object with these keys (file and line).
    """
    rows, lines = read_rows(path)
    columns = Columns(
        question=question_key,
        answer=answer_key,
        context=context_key,
        response=response_key,
        dataset=Path(path).stem.lower(),
    )
    return list(Table(rows, columns, where=path, lines=lines))


def read_rows(path: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Every object of the file and its line; blank lines are skipped. Raises ConfigError with file and line."""
    rows, lines = [], []
    for number, line in read_lines(path):
        rows.append(read_object(line, where=f"{path}:{number}"))
        lines.append(number)
    return rows, lines


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank with its number. Raises ConfigError where there is none."""
    has_rows = False
    try:
        with Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    has_rows = True
                    yield number, line
    except OSError as error:
        raise ConfigError(f"path={path}: cannot be read ({error.strerror}); give a JSON-lines file") from error
    if not has_rows:
        raise ConfigError(f"path={path}: the file has no rows")


def read_object(line: bytes, *, where: str) -> dict[str, Any]:
    """Raises ConfigError where the line is no JSON object."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}: column {error.colno})") from error
    except RecursionError:
        raise ConfigError(f"{where}: not JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON {type(row).__name__}, where an object is needed")
    return row
