"""Named columns of a dataset: from the Hugging Face hub, a folder laid out like the hub's, or a single file.

For example, the row that `data=gsm8k` reads:

    question: Natalia sold clips to 48 of her friends in April, ...
    answer:   Natalia sold 48/2 = <<48/2=24>>24 clips in May. ... #### 72
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from logging import CRITICAL
from pathlib import Path
from typing import Any

from distill_cli.data.rows import Columns, Stream, Table, or_blank
from distill_cli.data.sources.jsonl import read_example, read_lines, read_object
from distill_cli.errors import ConfigError
from distill_cli.types import Example

NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0, got 0")
"""Parts of the errors of `datasets` and pyarrow for a file that has columns alone."""
FORMATS = {
    **{".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"},
    ".txt": "text",  # a row a line, of the column `text`
}


def load(
    *,
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    question_key: str | None = "question",
    answer_key: str | None = "answer",
    answer_from: str | None = None,
    messages_key: str | None = None,
    response_key: str | None = None,
    context_key: str | None = None,
    teacher_key: str | None = None,
    dataset: str | None = None,
    repeat: int = 1,
    limit: int | None = None,
    streaming: bool = False,
) -> Sequence[Example] | Stream:
    """Return the examples of a split.

    Args:
        path: a name on the hub, a folder or a file.
        name: the dataset's configuration, if it has several.
        split: `train`, `test`, or a part such as `train[:1000]`; a single file is all of one split.
        revision: branch, tag or commit on the hub.
        question_key: column of the user's message. A dot goes into a nested column. null finds it: prompt, question,
            instruction, problem, query, input, text, or a conversation's: messages, conversation, chat.
        answer_key: column of the answer that a verifier compares with; null if there is none.
        answer_from: where the answer stands in that column: `final` (after ####), `boxed`; null takes all of it. A row
            without it has no answer.
        messages_key: column of a conversation, in place of question_key.
        response_key: column of a whole answer to imitate.
        context_key: column that only the teacher reads; `data.teacher_context` sets it.
        teacher_key: column that names a row's teachers; `data.teacher_key` sets it.
        dataset: name of these rows in scores by dataset; null is the last part of the path.
        repeat: how often each row is used, for averages over several answers.
        limit: use the first rows only, at most so many.
        streaming: read rows while they are used, without a copy on disk, for large datasets.

    Raises:
        ConfigError: the dataset cannot be loaded, has no such split or column, or a file is damaged.
    """
    for key, value in (("repeat", repeat), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    dataset = dataset or Path(path).stem.lower()
    columns = Columns(
        question_key, messages_key, answer_key, context_key, response_key, answer_from, dataset, teacher_key
    )
    if path.endswith(".jsonl"):
        where, line = next(read_lines(path))
        first_row = read_object(line, where=where)
        columns = columns.found_in(first_row, where=path)
        if not streaming:
            return [read_example(*line, columns) for line in islice(read_lines(path), limit)] * repeat
        columns.check(list(first_row), where=path)
        return _stream(lambda: (partial(read_example, *line, columns) for line in read_lines(path)), limit, repeat)
    rows, where = _open(path, name=name, split=split, revision=revision, streaming=streaming), f"{path} ({split})"
    if streaming:
        first = next(_read(rows, where=where), None)
        if first is None:
            raise ConfigError(f"{where}: no rows")
        columns = columns.found_in(first[1], where=where)
        columns.check(list(first[1]), where=where)
        make = columns.to_example
        return _stream(lambda: (partial(make, row, where=at) for at, row in _read(rows, where=where)), limit, repeat)
    if len(rows):
        columns = columns.found_in(rows[0], where=where)
    columns.check(rows.column_names, where=where)
    tops = {column.split(".")[0] for column in columns.named.values()}
    rows = rows.select_columns([column for column in rows.column_names if column in tops])
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return Table(rows, columns, where, repeat)


def _open(path: str, *, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """Return a Dataset, or an IterableDataset if it is streamed."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # errors that it would log are raised below, in one line
    here = Path(path).expanduser()
    is_saved = (here / "state.json").is_file() or (here / "dataset_dict.json").is_file()
    if here.is_file():
        arguments = _file_arguments(here, split)
    elif here.is_dir() or not path.startswith((".", "/", "~")):
        arguments = {"path": str(here) if here.is_dir() else path, "name": name, "split": split, "revision": revision}
    else:
        raise ConfigError(f"path={path}: no such file or folder")
    load = partial(datasets.load_dataset, **arguments, streaming=streaming)
    try:
        rows = datasets.load_from_disk(str(here)) if is_saved else load()
    except Exception as error:  # pyarrow, fsspec, the hub: each raises its own
        raise ConfigError(f"path={path}, split={split}: {_reason(error)}") from error
    if is_saved and hasattr(rows, "keys"):
        if split not in rows:
            raise ConfigError(f"split={split}: {path} has {', '.join(rows)}")
        rows = rows[split]
    return rows.to_iterable_dataset() if is_saved and streaming else rows


def _file_arguments(file: Path, split: str) -> dict[str, Any]:
    """Return the arguments of `load_dataset` for a single file, all of which is one split."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"path={file}: must be a folder, or a file of {', '.join(FORMATS)}")
    if file.stat().st_size == 0:
        raise ConfigError(f"path={file}: the file is empty")
    _, bracket, part = split.partition("[")
    separator = {"sep": "\t"} if suffix == ".tsv" else {}
    return {"path": FORMATS[suffix], "data_files": str(file), "split": f"train{bracket}{part}", **separator}


def _stream(makers: Callable[[], Iterator[Callable[[], Example]]], limit: int | None, repeat: int) -> Stream:
    """Return each row's example `repeat` times in turn; a row that is wrong gives a blank one."""
    return Stream(lambda: (one for make in islice(makers(), limit) for one in [or_blank(make)] * repeat))


def _read(rows: Any, *, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and content of each row. Raises ConfigError if the reader of the format fails."""
    last = where
    try:
        for index, row in enumerate(rows):
            yield f"{where}, row {index}", row
            last = f"{where}, after row {index}"
    except Exception as error:  # pyarrow, fsspec, the hub: each raises its own
        raise ConfigError(f"{last}: {_reason(error)}; mend the file") from error


def _reason(error: BaseException) -> str:
    """Return the innermost error's message in one line: `datasets` wraps it in others that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    if type(error).__name__ == "CastError":
        columns = [", ".join(getattr(error, f"{kind}_column_names")) for kind in ("requested", "table")]
        return f"its files have other columns ({') and ('.join(columns)}); make them the same, or give one file"
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "no rows" if any(part in text for part in NO_ROWS) else text
