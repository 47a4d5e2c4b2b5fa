"""Look at a teacher behind a server before a run starts: who it is, what it can score, and its tokenizer's files.

The files that checks and prompts read (config, tokenizer, template) come from the server, into a folder that stands for
the model's. No torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill_cli.config.derived import scored_length
from distill_cli.config.schema import Config, TeacherModel
from distill_cli.engines.replicas import Replicas, check_addresses
from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.wire import TOKEN
from distill_cli.errors import ConfigError, TeacherLost
from distill_cli.folders.atomic_dir import replacing
from distill_cli.models.model_files import FILE_NAMES, ModelFiles

PATIENCE_S = 10.0
"""How long a server may be silent before the run is refused; the ranks wait for `model.teacher.patience_s`."""


@dataclass(frozen=True)
class Served:
    """A served teacher as its servers describe it."""

    info: ServerInfo
    files: ModelFiles


def look_at(model: TeacherModel, *, key: str) -> Served:
    """Ask the servers of a teacher; `key` is its section.

    Raises:
        ConfigError: an address is wrong or silent, or something else answers there.
    """
    try:
        addresses = check_addresses(model.addresses, os.environ.get(TOKEN) or None)
        info, contents = asyncio.run(_ask(addresses, certificate=model.certificate))
    except ConfigError as error:
        raise ConfigError(*(f"{key}.url: {problem}" for problem in error.problems)) from error
    except TeacherLost as error:
        raise ConfigError(f"{key}.url: {error}") from error
    folder = keep_files(contents, vocab_size=info.vocab_size)
    files = ModelFiles.find(str(folder), key=f"{key}.url", needs_weights=False)
    return Served(info, replace(files, path=addresses[0], vocab_size=info.vocab_size))


async def _ask(addresses: list[str], *, certificate: str | None) -> tuple[ServerInfo, dict[str, str]]:
    file = None if certificate is None else Path(certificate)
    servers = Replicas(
        addresses,
        token=os.environ.get(TOKEN) or None,
        certificate=file,
        client="preflight",
        patience_s=PATIENCE_S,
        probe_s=PATIENCE_S,
        in_flight=1,
    )
    try:
        return await servers.info(), await servers.get("/files")
    finally:
        await servers.close()


def keep_files(contents: dict[str, Any], *, vocab_size: int) -> Path:
    """Write a model's small files into the user's cache, and return their folder."""
    found = {name: text for name, text in contents.items() if name in FILE_NAMES and isinstance(text, str)}
    digest = hashlib.sha256(json.dumps([found, vocab_size], sort_keys=True).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "distill" / "teachers" / digest[:32]
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(found.get("config.json", "{}"))
    if "vocab_size" not in (config.get("text_config") or config):  # the weights said it
        found["config.json"] = json.dumps(config | {"vocab_size": vocab_size})
    for name, text in found.items():
        with replacing(folder / name, unique=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder


def limit_problems(config: Config, served: Served, *, key: str) -> Iterator[str]:
    """Yield what the run needs and the servers of its only teacher do not give, with the flag that would."""
    info, topk, length = served.info, config.loss.topk, scored_length(config)
    at = f"{key}.url={served.files.path}"
    if topk > info.max_topk:
        yield f"loss.topk={topk}: {at} gives at most {info.max_topk}; start it with --max-topk {topk}, or lower it"
    if length > info.max_model_len:
        what = f"takes {info.max_model_len} tokens, and sequences have up to {length}"
        yield f"{at}: {what}; start it with engine.teacher.max_model_len={length}"
