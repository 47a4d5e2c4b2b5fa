"""Read the header of a safetensors file, and check that the file is whole. No torch.

A file is the header's size (8 bytes, little-endian), the header, JSON of {tensor: {dtype, shape, data_offsets}}, and
the tensors' bytes, to which the offsets refer (the README of huggingface/safetensors, "Format").
"""

import json
import math
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
BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "BOOL": 8},
    **{"U64": 64, "U32": 32, "U16": 16, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
}
"""Size of one element of each dtype, in bits. Tensors of any other dtype are not checked for their size."""


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
        places = sorted((*map(int, entry["data_offsets"]), name) for name, entry in entries.items())
        tensors = {name: _dtype_and_shape(entry) for name, entry in entries.items()}
        expected = begins_at + max((end for _, end, _ in places), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise damaged(file, f"no safetensors file: its header cannot be read ({error!r:.100})") from error
    if not tensors:
        raise damaged(file, "has no tensors")
    if expected != size:
        what = "is cut" if size < expected else "is too long"
        raise damaged(file, f"{what}: its header describes {expected} bytes, and the file has {size}")
    end_before = 0
    for begin, end, name in places:
        dtype, shape = tensors[name]
        num_bytes = math.prod(shape) * BITS[dtype] // 8 if dtype in BITS else end - begin
        if begin != end_before or end - begin != num_bytes:
            where = f"bytes {begin} to {end}, after those to {end_before}"
            raise damaged(file, f"{name}, {dtype} of shape {list(shape)}, cannot be at {where}")
        end_before = end
    return tensors


def _dtype_and_shape(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    shape = tuple(entry["shape"])
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape {entry['shape']}")
    return str(entry["dtype"]), shape


def damaged(file: Path, what: str) -> ConfigError:
    """Return the error for a file of a model that must be downloaded again."""
    return ConfigError(f"{file}: {what}; the model's folder is damaged, download it again")
