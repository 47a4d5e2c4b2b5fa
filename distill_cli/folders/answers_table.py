"""A model's answers to a benchmark as parquet: written by the ranks that sampled them, joined by the command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("problem", pa.int64()),  # its index in the data
        ("number", pa.int64()),  # index of the answer among those to its problem
        ("question", pa.string()),
        ("reference", pa.string()),  # the correct answer
        ("response", pa.string()),
        ("final_answer", pa.string()),  # as the verifier reads it; null if there is none
        ("reward", pa.float64()),
        ("num_tokens", pa.int64()),
        ("finish_reason", pa.string()),
    ]
)
PARTS = "answers.rank_*.parquet"


class AnswersFile:
    """One rank's part of a model's answers, one row group per batch."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._writer = pq.ParquetWriter(folder / PARTS.replace("*", str(rank)), SCHEMA)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append a batch of rows with the columns of `SCHEMA`."""
        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA))

    def close(self) -> None:
        self._writer.close()


def join_answers(folder: Path) -> Path:
    """Join the ranks' parts into answers.parquet, in the order of the problems; return the file."""
    parts, file = sorted(folder.glob(PARTS)), folder / "answers.parquet"
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    pq.write_table(table.sort_by([("dataset", "ascending"), ("problem", "ascending"), ("number", "ascending")]), file)
    for part in parts:
        part.unlink()
    return file


def read_answers(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return these columns of the answers in a file, one dictionary per answer."""
    return pq.read_table(file, columns=list(columns)).to_pylist()
