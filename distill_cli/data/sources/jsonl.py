"""A JSON-lines file: one object a line.

{"question": "What is 3 + 4?", "answer": "7"}
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill_cli.data.rows import Columns
from distill_cli.errors import ConfigError
from distill_cli.types import Example


def load(
    *,
    path: str,
    question_key: str = "question",
    answer_key: str | None = "answer",
    context_key: str | None = None,
    response_key: str | None = None,
    teacher_key: str | None = None,
) -> Sequence[Example]:
    """Return the example of every row of the file; blank lines are skipped.

    Args:
        answer_key: null if the rows carry no answers to check.
        context_key: column that only the teacher reads; `data.teacher_context` sets it.
        response_key: column of a whole answer to imitate.
        teacher_key: column that names a row's teachers; `data.teacher_key` sets it.

    Raises:
        ConfigError: the file is missing or empty, or a line is not a JSON object with these keys (file and line).
    """
    dataset = Path(path).stem.lower()
    columns = Columns(question_key, None, answer_key, context_key, response_key, None, dataset, teacher_key)
    return [read_example(*line, columns) for line in read_lines(path)]


def read_example(where: str, line: bytes, columns: Columns) -> Example:
    """Return the example of one line. Raises ConfigError with file and line."""
    return columns.to_example(read_object(line, where=where), where=where)


def read_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield `path:number` and content of each line that is not blank. Raises ConfigError if there is none."""
    where = ""
    try:
        with Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, line
    except OSError as error:
        raise ConfigError(f"path={path}: cannot be read ({error.strerror}); give a JSON-lines file") from error
    if not where:
        raise ConfigError(f"path={path}: the file has no rows")


def read_object(line: bytes, *, where: str) -> dict[str, Any]:
    """Parse a line. Raises ConfigError if it is not a JSON object."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}: column {error.colno})") from error
    except RecursionError:
        raise ConfigError(f"{where}: JSON nested too deeply") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON {type(row).__name__}, must be an object")
    return row
