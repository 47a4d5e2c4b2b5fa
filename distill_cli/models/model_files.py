"""Find a model's files and read its config and headers as JSON, so that checks need no torch.

`package://...` is a folder that ships with distill; a folder is itself; anything else is a name on the hub.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.models.safetensors_header import LFS_POINTER, Header, damaged, read_header
from distill_cli.models.tensor_names import EMBEDDING, text_tensors

Shapes = Mapping[str, tuple[int, ...]]
State = tuple[Path, int, int]
"""What tells a file from its later content: path, size and time of its last change."""
ASSETS = Path(__file__).parent.parent / "assets"
NOT_FOUND = "no such folder, and not on the hub or in its cache"
"""What is wrong with a path that names no model."""
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
"""Files downloaded from the hub: no pickles. Python runs only if `model.trust_remote_code` is set."""
FILE_NAMES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)
"""Text files that say what a model reads and how it ends; its weights are not among them."""
NOT_FILES = ["*/*", "consolidated*"]
"""Files that are not: the same weights once more, in another format."""
INDEX = "model.safetensors.index.json"
ADAPTERS = ("adapter_model.safetensors",)
OTHER_FORMATS = {
    "adapter_config.json": ("adapters alone", "give their base model with them merged (peft's merge_and_unload)"),
    "*.gguf": ("a GGUF file", "give the same model's *.safetensors"),
    "pytorch_model*.bin": ("pickles, which are not loaded", "load and save it with transformers once"),
}
"""Files of folders without *.safetensors of a model: what they are, and what to do."""
PIECES, PIECE_BYTES = 64, 2**16
"""Pieces of a file that its fingerprint reads, and their size."""
SHARD = re.compile(r"-of-(\d+)\.safetensors$")
PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
"""Types of weights that are not quantized, in safetensors' notation."""
MAX_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names in config.json of the length of the longest sequence."""
CACHE_ONLY = "DISTILL_CACHE_ONLY"
"""Environment variable that keeps a process off the hub; set for ranks, whose models the launcher has downloaded."""


@dataclass(frozen=True)
class ModelFiles:
    """A model as its files describe it, read once."""

    path: str
    """As in the config: a folder or a name on the hub."""
    revision: str | None
    folder: Path
    vocab_size: int
    """Rows of the embedding: tokens, and padding."""
    max_positions: int | None
    """Tokens of the longest sequence; None if config.json does not say."""
    eos_ids: tuple[int, ...]
    """Tokens that end an answer (`generation_config.json`, else `config.json`)."""

    @classmethod
    def find(cls, path: str, *, revision: str | None = None, key: str, needs_weights: bool = True) -> ModelFiles:
        """Locate a model, downloading it if needed. Raises ConfigError that names `key`."""
        folder = locate(path, revision=revision, key=key, needs_weights=needs_weights)
        config, generation = read_config(folder), read_object(folder / "generation_config.json")
        parts = (text_config(config), config)
        positions = [part[name] for part in parts for name in MAX_POSITIONS if isinstance(part.get(name), int)]
        ends = [part["eos_token_id"] for part in (generation, *parts[::-1]) if part.get("eos_token_id") is not None]
        ids = ends[0] if ends and isinstance(ends[0], list) else ends[:1]
        size = vocab_size(folder)
        if not all(isinstance(one, int) and 0 <= one < size for one in ids):
            rule = f"must be an id below {size}, the vocabulary's size, or a list of them"
            where = "in generation_config.json or config.json"
            raise ConfigError(f"{key}={path}: eos_token_id={ends[0]!r:.60} {where}, {rule}; correct it")
        return cls(path, revision, folder, size, next(iter(positions), None), tuple(sorted({*ids})))

    def on_this_machine(self, *, key: str) -> ModelFiles:
        """Return the same with its folder on this machine, whose cache may be elsewhere. Raises ConfigError."""
        if self.folder.is_dir():
            return self
        return replace(self, folder=locate(self.path, revision=self.revision, key=key))


def locate(path: str, *, revision: str | None = None, key: str, needs_weights: bool = True) -> Path:
    """Return the folder of a model, downloaded from the hub if needed.

    Raises:
        ConfigError: it does not exist, or is not a model.
    """
    is_local = path.startswith(("package://", ".", "/", "~")) or path.count("/") > 1 or Path(path).exists()
    if is_local and revision is not None:
        revision_key = key.replace(".path", ".revision")
        raise ConfigError(f"{revision_key}={revision}: {path} is a folder, which has no revisions; drop it")
    shipped = path.replace("package://", f"{ASSETS}/")
    folder = Path(shipped).expanduser() if is_local else _download(path, revision, key, needs_weights=needs_weights)
    if not path or not folder.is_dir():
        problem = "no such folder" if path else "is empty"
        raise ConfigError(f"{key}={path}: {problem}; give a Hugging Face model's folder or its name on the hub")
    not_a_model = f"{key}={path}: not a Hugging Face model (config.json: {{}}); give one".format
    has_weights = not needs_weights or any(name.name not in ADAPTERS for name in folder.glob("*.safetensors"))
    if not has_weights:
        for file, (what, fix) in OTHER_FORMATS.items():
            if any(folder.glob(file)):
                raise ConfigError(f"{key}={path}: holds {what}; {fix}")
    try:
        config = read_config(folder)
        if not isinstance(config, dict) or not isinstance(text := config.get("text_config") or {}, dict):
            raise ConfigError(not_a_model("not an object"))
        if config.get("text_config") is not None and not text:
            raise ConfigError(not_a_model("its text_config is empty"))
    except OSError as error:
        raise ConfigError(not_a_model(error.strerror)) from error
    if not has_weights:
        raise ConfigError(f"{key}={path}: no weights are there; *.safetensors are needed")
    try:
        vocab_size(folder)
    except ValueError as error:
        raise ConfigError(not_a_model(error)) from error
    return folder.resolve()


def _download(path: str, revision: str | None, key: str, *, needs_weights: bool) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    try:
        is_offline = CACHE_ONLY in os.environ
        files = FILES if needs_weights else list(FILE_NAMES)
        patterns: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": NOT_FILES}
        return Path(snapshot_download(path, revision=revision, local_files_only=is_offline, **patterns))
    except (OSError, ValueError) as error:  # the bases of its HTTP, cache and validation errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{key}={path}: {NOT_FOUND} ({reason})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises ConfigError if it is not JSON."""
    return read_json(folder / "config.json")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model."""
    return config.get("text_config") or config


def read_json(file: Path) -> Any:
    """Return the content of a JSON file. Raises ConfigError if it is not JSON."""
    text = file.read_bytes()
    if text.startswith(LFS_POINTER):
        raise ConfigError(f"{file}: is a pointer of Git LFS, not the file; run git lfs pull in its folder")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({str(error)[:100]}); the model's folder is damaged") from error


def read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no such file. Raises ConfigError if it is something else."""
    if not file.is_file():
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a JSON {type(value).__name__}, must be an object")
    return value


def vocab_size(folder: Path) -> int:
    """Return the rows of the embedding: by config.json, or by the weights if it leaves them out (Gemma 3).

    Raises:
        ValueError: neither says it.
        ConfigError: a file is damaged.
    """
    config = read_config(folder)
    sizes = [part["vocab_size"] for part in (text_config(config), config) if "vocab_size" in part]
    if not sizes:
        rows = {shape[0] for name, shape in text_shapes(folder).items() if EMBEDDING.search(name)}
        sizes = sorted(rows) if len(rows) == 1 else [None]
    if not isinstance(sizes[0], int) or isinstance(sizes[0], bool) or sizes[0] < 1:
        raise ValueError(f"vocab_size={sizes[0]!r:.60}, must be a number from 1")
    return sizes[0]


def hidden_size(folder: Path) -> int:
    """Return the numbers of a hidden state by config.json, 0 if it leaves them out. Raises ConfigError if damaged."""
    size = text_config(read_config(folder)).get("hidden_size", 0)
    return size if isinstance(size, int) else 0


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return {token: id} of a fast tokenizer, added tokens included; None without a tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        vocab = content["model"].get("vocab") or {}
        if not isinstance(vocab, dict):  # unigram models list [token, score]
            vocab = {token: index for index, (token, _) in enumerate(vocab)}
        return vocab | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: no tokenizer of the tokenizers library ({error!r})") from error


def small_files(folder: Path) -> dict[str, str]:
    """Return name and text of each of FILE_NAMES that a folder has."""
    found = {name: folder / name for name in FILE_NAMES}
    return {name: file.read_text(encoding="utf-8") for name, file in found.items() if file.is_file()}


def fingerprint(folder: Path) -> str:
    """Hash the name, size and some pieces, the header included, of each of a folder's weight files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for piece in range(PIECES):
                stream.seek(piece * size // PIECES)
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights: those of the index, or `model.safetensors`, or all.

    Raises:
        ConfigError: the index is damaged, or a file of several is not there.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        numbers = {int(match[1]) for file in found if (match := SHARD.search(file.name))}
        if numbers and len(found) != max(numbers):
            raise damaged(found[0], f"{max(numbers)} files belong together, and {len(found)} are there")
        return found
    files = [folder / name for name in sorted({*_weight_map(*_state(index)).values()})]
    if missing := [file.name for file in files if not file.is_file()]:
        raise damaged(index, f"{len(missing)} of its {len(files)} files are not there, such as {missing[0]}")
    return files


def _state(file: Path) -> State:
    try:
        status = file.stat()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a model whose files can be read") from error
    return file, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _weight_map(index: Path, *_state: int) -> Mapping[str, str]:
    """Return the name of the file of each tensor. Raises ConfigError if the index is damaged."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise damaged(index, "has no weight_map of tensors and their files")
    return names


def files_of(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor. Raises ConfigError if one is damaged."""
    return {name: file for file in weight_files(folder) for name in read_header(file)}


def tensors(folder: Path) -> Header:
    """Return each tensor's dtype (in safetensors' notation: F32, BF16) and shape, read once while files stay the same.

    Raises:
        ConfigError: a file is damaged, or lacks a tensor that the index says it has.
    """
    return _contents(folder).tensors


def shapes(folder: Path) -> Shapes:
    """Return each tensor's shape. Raises ConfigError if a file is damaged."""
    return _contents(folder).shapes


def text_shapes(folder: Path) -> Shapes:
    """Return the shapes of the tensors of the text model. Raises ConfigError if a file is damaged."""
    return _contents(folder).text_shapes


def elements(folder: Path) -> Mapping[tuple[str, bool], int]:
    """Return the elements of all tensors by their dtype, and by whether they are matrices in layers.

    Raises:
        ConfigError: a file is damaged.
    """
    return _contents(folder).elements


class Contents:
    """The headers of a model's weight files, put together."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: Header = {name: entry for file in files for name, entry in read_header(file).items()}
        self.shapes: Shapes = {name: shape for name, (_, shape) in self.tensors.items()}
        self.text_shapes: Shapes = text_tensors(self.shapes)
        self.elements = Counter[tuple[str, bool]]()
        for name, (dtype, shape) in self.tensors.items():
            self.elements[dtype, ".layers." in name and len(shape) == 2] += math.prod(shape)


def _contents(folder: Path) -> Contents:
    index, files = folder / INDEX, weight_files(folder)
    return _read_contents(_state(index) if index.is_file() else None, tuple(_state(file) for file in files))


@lru_cache(maxsize=16)
def _read_contents(index: State | None, files: tuple[State, ...]) -> Contents:
    found = Contents([file for file, *_ in files])
    if index and (missing := _weight_map(*index).keys() - found.tensors.keys()):
        raise damaged(index[0], f"{len(missing)} of its tensors are in no file, such as {min(missing)}")
    return found
