"""Find a model's files and read its config and headers as JSON, so that checks need no torch.

`package://...` is a folder that ships with distill; a folder is itself; anything else is a name on the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill_cli.errors import ConfigError

ASSETS = Path(__file__).parent.parent / "assets"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
"""Files downloaded from the hub: no pickles. Python runs only if `model.trust_remote_code` is set."""
PIECES, PIECE_BYTES = 64, 2**16
"""Pieces of a file that its fingerprint reads, and their size."""
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
    def find(cls, path: str, *, revision: str | None = None, key: str) -> ModelFiles:
        """Locate a model, downloading it if needed. Raises ConfigError that names `key`."""
        folder = locate(path, revision=revision, key=key)
        config = read_config(folder)
        positions = text_config(config).get("max_position_embeddings")
        ends = [read_object(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        ids: list[int] | int = next((one for one in ends if one is not None), [])
        eos_ids = tuple(sorted(set(ids if isinstance(ids, list) else [ids])))
        return cls(path, revision, folder, vocab_size(config), positions, eos_ids)

    def on_this_machine(self, *, key: str) -> ModelFiles:
        """Return the same with its folder on this machine, whose cache may be elsewhere. Raises ConfigError."""
        if self.folder.is_dir():
            return self
        return replace(self, folder=locate(self.path, revision=self.revision, key=key))


def locate(path: str, *, revision: str | None = None, key: str) -> Path:
    """Return the folder of a model, downloaded from the hub if needed.

    Raises:
        ConfigError: it does not exist, or is not a model.
    """
    is_local = path.startswith(("package://", ".", "/", "~")) or path.count("/") > 1 or Path(path).exists()
    if is_local and revision is not None:
        revision_key = key.replace(".path", ".revision")
        raise ConfigError(f"{revision_key}={revision}: {path} is a folder, which has no revisions; drop it")
    shipped = path.replace("package://", f"{ASSETS}/")
    folder = Path(shipped).expanduser() if is_local else _download(path, revision, key)
    if not path or not folder.is_dir():
        problem = "no such folder" if path else "is empty"
        raise ConfigError(f"{key}={path}: {problem}; give a Hugging Face model's folder or its name on the hub")
    try:
        vocab_size(read_config(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        why = error.strerror if isinstance(error, OSError) else repr(error)
        raise ConfigError(f"{key}={path}: not a Hugging Face model (config.json: {why}); give one") from error
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key}={path}: no weights are there; *.safetensors are needed (pickles are not loaded)")
    return folder.resolve()


def _download(path: str, revision: str | None, key: str) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    try:
        is_offline = CACHE_ONLY in os.environ
        return Path(snapshot_download(path, revision=revision, allow_patterns=FILES, local_files_only=is_offline))
    except (OSError, ValueError) as error:  # the bases of its HTTP, cache and validation errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{key}={path}: no such folder, and not on the hub or in its cache ({reason})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises ConfigError if it is not JSON."""
    return read_json(folder / "config.json")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that describes the language model."""
    return config.get("text_config") or config


def read_json(file: Path) -> Any:
    """Return the content of a JSON file. Raises ConfigError if it is not JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({str(error)[:100]}); the model's folder is damaged") from error


def read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no such file. Raises ConfigError if it is something else."""
    if not file.is_file():
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a JSON {type(value).__name__}, must be an object")
    return value


def vocab_size(config: dict[str, Any]) -> int:
    """Return the rows of the embedding according to config.json."""
    return int(text_config(config)["vocab_size"])


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


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape. Raises ConfigError if a file is damaged."""
    return {name: shape for name, (_, shape) in tensors(folder).items()}


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read each tensor's dtype (in safetensors' notation: F32, BF16) and shape from the headers of the folder's files.

    Raises ConfigError if a file is damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in [folder / name for name in names] or sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as content:
                slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
                headers |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: no safetensors ({error}); the model's folder is damaged") from error
    return headers
