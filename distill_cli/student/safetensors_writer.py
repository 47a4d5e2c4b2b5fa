"""Write a model's weights as safetensors files, a few tensors at a time."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from distill_cli.errors import ConfigError

READ_BYTES = 2**28
"""Size of the tensors that are read at once; a larger tensor is read alone."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors' format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Weights:
    """Tensors that are read on demand."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]]
    """Return the tensors with these names."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """dtypes of the tensors that are written unchanged; the others are cast."""

    def num_bytes(self, name: str, *, dtype: torch.dtype) -> int:
        """Return the size of a tensor that is cast to `dtype` unless it is written as it is."""
        return math.prod(self.shapes[name]) * self.dtypes.get(name, dtype).itemsize


def write_weights(weights: Weights, folder: Path, *, dtype: torch.dtype, max_file_bytes: int) -> None:
    """Write safetensors files of at most `max_file_bytes` each, or of one tensor, with an index if there are several.

    Raises:
        ConfigError: the disk lacks space for them; nothing is written.
    """
    num_bytes = {name: weights.num_bytes(name, dtype=dtype) for name in weights.shapes}
    total, free = sum(num_bytes.values()) / 1e9, shutil.disk_usage(folder).free / 1e9
    if total > free:
        what = f"{folder.parent}: the student takes {total:.2f} GB, and {free:.2f} GB are free"
        raise ConfigError(f"{what}; give another folder, or make room")
    files = split(num_bytes, max_file_bytes)
    for file, names in files.filename_to_tensors.items():
        write_safetensors(folder / file, names, weights, dtype=dtype)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(file: Path, names: Sequence[str], weights: Weights, *, dtype: torch.dtype) -> None:
    """Write one file, a few tensors at a time: safetensors' own writer takes all at once, and copies each.

    The format: the length of the header in eight bytes, the header in JSON, the tensors' bytes end to end.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    num_bytes = {name: weights.num_bytes(name, dtype=dtype) for name in names}
    parts = split(num_bytes, READ_BYTES).filename_to_tensors.values()
    for name in (name for part in parts for name in part):
        begin, end = end, end + num_bytes[name]
        kind = DTYPE_NAMES[weights.dtypes.get(name, dtype)]
        header[name] = {"dtype": kind, "shape": list(weights.shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            tensors = weights.read(part)
            for name in part:
                tensor = tensors.pop(name).to(weights.dtypes.get(name, dtype)).contiguous()
                stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def split(num_bytes: dict[str, int], limit: int) -> StateDictSplit:
    """Divide names into files of at most `limit` bytes; a tensor that is larger has a file of its own."""
    return split_state_dict_into_shards_factory(
        num_bytes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
