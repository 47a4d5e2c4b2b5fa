"""Named columns of a dataset: of the Hugging Face hub, a folder like one of the hub's, or a parquet, csv or jsonl file.

For example, the row that `data=gsm8k` reads:

    question: Natalia sold clips to 48 of her friends in April, ...
    answer:   Natalia sold 48/2 = <<48/2=24>>24 clips in May. ... #### 72
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from logging import CRITICAL
from pathlib import Path
from typing import Any

from distill_cli.data.rows import Columns, Stream, Table, or_blank
from distill_cli.data.sources.jsonl import read_lines, read_object, read_rows
from distill_cli.errors import ConfigError
from distill_cli.types import Example

NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0, got 0")
"""What `datasets` and pyarrow say of a file that has columns alone."""
FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def load(
    *,
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    question_key: str = "question",
    answer_key: str | None = "answer",
    answer_from: str | None = None,
    messages_key: str | None = None,
    response_key: str | None = None,
    context_key: str | None = None,
    dataset: str | None = None,
    repeat: int = 1,
    limit: int | None = None,
    streaming: bool = False,
) -> Sequence[Example] | Stream:
    """The examples of a split.

    Args:
        path: a name on the hub, a folder or a file.
        name: the dataset's configuration, where it has several.
        split: `train`, `test`, or a part such as `train[:1000]`; a single file is all of one split.
        revision: branch, tag or commit on the hub.
        question_key: column of the user's message. A dot goes into a nested column.
        answer_key: column of the answer that a verifier compares with; null where there is none.
        answer_from: how the answer is found in that column: `final` (after ####), `boxed`; null takes all of it. A row
            without it has no answer.
        messages_key: column of a conversation, in place of question_key.
        response_key: column of a whole answer to imitate.
        context_key: column that only the teacher sees; `data.teacher_context` sets it.
        dataset: what scores of these rows go under; null is the last part of the path.
        repeat: how often each row is asked, for averages over several answers.
        limit: rows, at most: the first.
        streaming: read as it comes, without a copy on disk, for sets that are large.

    Raises:
        ConfigError: it is not to be had, it has no such split or column, or a file is damaged.
    """
    _check_numbers(repeat=repeat, limit=limit)
    columns = Columns(
        question=question_key,
        answer=answer_key,
        messages=messages_key,
        context=context_key,
        response=response_key,
        answer_from=answer_from,
        dataset=dataset or Path(path).stem.lower(),
    )
    if path.endswith(".jsonl") and streaming:
        number, line = next(read_lines(path))
        columns.check(list(read_object(line, where=f"{path}:{number}")), where=path)
        return Stream(lambda: _read_file(path, columns, limit=limit, repeat=repeat))
    if path.endswith(".jsonl"):
        rows, lines = read_rows(path)
        return list(Table(rows[:limit], columns, where=path, lines=lines, repeat=repeat))
    rows = _open(path, name=name, split=split, revision=revision, streaming=streaming)
    where = f"{path} ({split})"
    if streaming:
        _check_stream(rows, columns, where=where)
        return Stream(lambda: _read(rows, columns, where=where, limit=limit, repeat=repeat))
    columns.check(rows.column_names, where=where)
    tops = {column.split(".")[0] for column in columns.named.values()}
    rows = rows.select_columns([column for column in rows.column_names if column in tops])
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    return Table(rows, columns, where=where, repeat=repeat)


def _check_numbers(*, repeat: int, limit: int | None) -> None:
    for key, value in (("repeat", repeat), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")


def _open(path: str, *, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """-> a Dataset, or an IterableDataset where it is streamed."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # what it logs of an error is said below, in one line
    here = Path(path).expanduser()
    try:
        if here.is_file():
            kind = FORMATS.get(here.suffix.lower())
            if kind is None:
                raise ConfigError(f"path={path}: must be a folder, or a file of {', '.join(FORMATS)}")
            _check_not_empty(here)
            extra = {"sep": "\t"} if here.suffix.lower() == ".tsv" else {}
            part = "train" + split[split.index("[") :] if "[" in split else "train"
            return datasets.load_dataset(kind, data_files=str(here), split=part, streaming=streaming, **extra)
        if (here / "state.json").is_file() or (here / "dataset_dict.json").is_file():
            return _saved(datasets.load_from_disk(str(here)), path, split, streaming=streaming)
        if not here.is_dir() and path.startswith((".", "/", "~")):
            raise ConfigError(f"path={path}: no such file or folder")
        target = str(here) if here.is_dir() else path
        return datasets.load_dataset(target, name, split=split, revision=revision, streaming=streaming)
    except ConfigError:
        raise
    except Exception as error:  # pyarrow, fsspec, the hub: each raises its own
        if any(said in _reason(error) for said in NO_ROWS):
            raise ConfigError(f"path={path}: the split {split} has no rows") from error
        raise ConfigError(f"path={path}: {_reason(error)}") from error


def _saved(found: Any, path: str, split: str, *, streaming: bool) -> Any:
    """A split of what `save_to_disk` wrote."""
    if hasattr(found, "keys"):
        if split not in found:
            raise ConfigError(f"split={split}: {path} has {', '.join(found)}")
        found = found[split]
    return found.to_iterable_dataset() if streaming else found


def _check_not_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise ConfigError(f"path={file}: the file is empty")


def _check_stream(rows: Any, columns: Columns, *, where: str) -> None:
    try:
        first = next(iter(rows), None)
    except Exception as error:
        said = _reason(error)
        raise ConfigError(f"{where}: {'no rows' if any(part in said for part in NO_ROWS) else said}") from error
    if first is None:
        raise ConfigError(f"{where}: no rows")
    columns.check(list(first), where=where)


def _read(rows: Any, columns: Columns, *, where: str, limit: int | None, repeat: int) -> Iterator[Example]:
    """Each row, `repeat` times in turn. Raises ConfigError where the reader of its format cannot go on."""
    index, reader = 0, iter(rows if limit is None else rows.take(limit))
    while True:
        try:
            row = next(reader, None)
        except Exception as error:  # pyarrow, fsspec, the hub: each raises its own
            raise ConfigError(f"{where}, after row {index - 1}: {_reason(error)}; mend the file") from error
        if row is None:
            return
        yield from [or_blank(partial(columns.to_example, row, where=f"{where}, row {index}"))] * repeat
        index += 1


def _read_file(path: str, columns: Columns, *, limit: int | None, repeat: int) -> Iterator[Example]:
    """Each row of a JSON-lines file, `repeat` times in turn; a line that is none is a blank row."""

    def example(number: int, line: bytes) -> Example:
        where = f"{path}:{number}"
        return columns.to_example(read_object(line, where=where), where=where)

    for number, line in islice(read_lines(path), limit):
        yield from [or_blank(partial(example, number, line))] * repeat


def _reason(error: BaseException) -> str:
    """What the innermost error says, in one line: `datasets` wraps the others in `an error occurred`."""
    while error.__cause__ is not None:
        error = error.__cause__
    if type(error).__name__ == "CastError":
        columns = (", ".join(names) for names in (error.requested_column_names, error.table_column_names))
        return f"its files have other columns ({') and ('.join(columns)}); make them the same, or give one file"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
