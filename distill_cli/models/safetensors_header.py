"""Read the header of a safetensors file, and check that the file is whole. No torch.

A file is the header's size (8 bytes, little-endian), the header, JSON of {tensor: {dtype, shape, data_offsets}}, and
the tensors' bytes, to which the offsets refer (the README of huggingface/safetensors, "Format").
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill_cli.errors import ConfigError

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype, in safetensors' notation (F32, BF16), and shape of each tensor."""
SIZE_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""The library's own limit."""
LFS_POINTER = b"version "
"""What a file begins with in a clone made without Git LFS."""


def read_header(file: Path) -> Header:
    """Return the content of a file's header, which is read once in a process.

    Raises:
        ConfigError: the file cannot be read, is no safetensors file, or is not as long as its header says.
    """
    try:
        status = file.stat()
        return _read(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a model whose files can be read") from error


@lru_cache(maxsize=4096)
def _read(file: Path, size: int, _changed: int) -> Header:
    with file.open("rb") as stream:
        begin = stream.read(SIZE_BYTES)
        if begin == LFS_POINTER:
            raise ConfigError(f"{file}: is a pointer of Git LFS, not the weights; run git lfs pull in its folder")
        begins_at = SIZE_BYTES + int.from_bytes(begin, "little")
        if len(begin) < SIZE_BYTES or begins_at - SIZE_BYTES > MOST_HEADER_BYTES:
            raise damaged(file, f"no safetensors file: of its {size} bytes the first are no header's size")
        if begins_at > size:
            raise damaged(file, f"is cut: its header ends at byte {begins_at}, and the file has {size} bytes")
        header = stream.read(begins_at - SIZE_BYTES)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        tensors = {name: _dtype_and_shape(entry) for name, entry in entries.items()}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        expected = begins_at + max(map(int, ends), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise damaged(file, f"no safetensors file: its header cannot be read ({error!r:.100})") from error
    if expected != size:
        what = "is cut" if size < expected else "is too long"
        raise damaged(file, f"{what}: its header describes {expected} bytes, and the file has {size}")
    return tensors


def _dtype_and_shape(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    return str(entry["dtype"]), tuple(int(size) for size in entry["shape"])


def damaged(file: Path, what: str) -> ConfigError:
    """Return the error for a file of a model that must be downloaded again."""
    return ConfigError(f"{file}: {what}; the model's folder is damaged, download it again")
