"""Look at a teacher behind a server before a run starts: who it is, what it can score, and its tokenizer's files.

The files that checks and prompts read (config, tokenizer, template) come from `distill serve`, or from the model's
folder if it is `vllm serve`, into a folder that stands for the model's. No torch.
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

from distill_cli.config.derived import needs_hidden, scored_length
from distill_cli.config.schema import Config, TeacherModel
from distill_cli.engines.recognise import recognise
from distill_cli.engines.replicas import Replicas
from distill_cli.engines.server_info import DISTILL, VLLM, ServerKind
from distill_cli.errors import ConfigError, DistillError, TeacherLost
from distill_cli.folders.atomic_dir import replacing
from distill_cli.jobs import vllm_teachers
from distill_cli.models import model_files
from distill_cli.models.model_files import FILE_NAMES, ModelFiles
from distill_cli.resolved import SharedVocabulary

PATIENCE_S = 10.0
"""How long a server may be silent before the run is refused; the ranks wait for `model.teacher.patience_s`."""


@dataclass(frozen=True)
class Served:
    """A served teacher as its servers describe it."""

    kind: ServerKind[Any]
    files: ModelFiles
    """`path` is the first address."""
    max_length: int
    """Tokens of the longest sequence that can be scored."""
    max_topk: int | None
    """None if the servers do not say."""
    version: str
    """Version of distill or vLLM on the servers."""
    dtype: str | None = None
    """Type of its weights; None if the servers do not say."""


def look_at(model: TeacherModel, *, key: str) -> Served:
    """Ask the servers of a teacher; `key` is its section.

    Raises:
        ConfigError: an address is wrong or silent, something else answers there, or the model's files are not found.
    """
    try:
        return asyncio.run(_look_at(model, key=key))
    except AboutFiles as error:
        raise ConfigError(*error.problems) from error
    except ConfigError as error:
        raise ConfigError(*(f"{key}.url: {problem}" for problem in error.problems)) from error
    except TeacherLost as error:
        raise ConfigError(f"{key}.url: {error}") from error


class AboutFiles(ConfigError):
    """Problems that name the key of the model's path, not that of its address."""


async def _look_at(model: TeacherModel, *, key: str) -> Served:
    kind = await recognise(model.addresses, certificate=model.certificate, patience_s=PATIENCE_S)
    servers = replicas(model, kind)
    try:
        return await (_look_at_distill(servers, key) if kind is DISTILL else _look_at_vllm(servers, model, key))
    finally:
        await servers.close()


def replicas(model: TeacherModel, kind: ServerKind[Any]) -> Replicas[Any]:
    """Return the servers of a teacher. Call it in the event loop, and close it."""
    return Replicas(
        model.addresses,
        kind=kind,
        certificate=model.certificate,
        client="preflight",
        patience_s=PATIENCE_S,
        probe_s=PATIENCE_S,
        in_flight=1,
    )


async def _look_at_distill(servers: Replicas[Any], key: str) -> Served:
    info, contents = await servers.info(), await servers.get("/files")
    files = kept_files(contents, vocab_size=info.vocab_size, path=servers.addresses[0], key=key)
    return Served(DISTILL, files, info.max_model_len, info.max_topk, info.version, info.dtype)


async def _look_at_vllm(servers: Replicas[Any], model: TeacherModel, key: str) -> Served:
    info, version = await servers.info(), (await servers.get("/version") or {}).get("version", "of an unknown version")
    try:
        found = vllm_teachers.find_files(model, info, key=key)
    except ConfigError as error:
        raise AboutFiles(*error.problems) from error
    contents, size = model_files.small_files(found.folder), found.vocab_size
    files = kept_files(contents, vocab_size=size, path=servers.addresses[0], key=key)
    # Every request of vLLM samples a token, for which there must be room.
    return Served(VLLM, files, info.max_model_len - 1, await vllm_teachers.most_topk(servers, info), str(version))


def kept_files(contents: dict[str, Any], *, vocab_size: int, path: str, key: str) -> ModelFiles:
    """Keep a model's small files, and return them with the path by which messages call the model."""
    folder = keep_files(contents, vocab_size=vocab_size)
    files = ModelFiles.find(str(folder), key=f"{key}.url", needs_weights=False)
    return replace(files, path=path, vocab_size=vocab_size)


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
    topk, length, most = config.loss.topk, scored_length(config), served.max_topk
    if config.model.teacher.has_own_tokenizer:  # what is longer is left out
        length = config.engine.teacher.max_model_len or length
    at, is_vllm = f"{key}.url={served.files.path}", served.kind is VLLM
    if most is not None and topk > most:
        flag = f"--max-logprobs {topk}" if is_vllm else f"--max-topk {topk}"
        yield f"loss.topk={topk}: {at} gives at most {most}; start it with {flag}, or lower it"
    if length > served.max_length:
        flag = f"--max-model-len {length + 1}" if is_vllm else f"engine.teacher.max_model_len={length}"
        fix = f"start it with {flag}"
        if config.model.teacher.has_own_tokenizer:
            fix += f", or set engine.teacher.max_model_len={served.max_length}: longer ones are left out from there on"
        yield f"{at}: takes {served.max_length} tokens, and sequences have up to {length}; {fix}"


def vllm_problems(
    config: Config, served: Served, *, key: str, vocabulary: SharedVocabulary | None, tokenizer: ModelFiles | None
) -> Iterator[str]:
    """Yield why servers of vLLM cannot score for the run with their only teacher: by its config, and by numbers.

    Args:
        tokenizer: the model whose tokenizer renders the prompts; None if it was not found.
    """
    at, only = f"{key}.url={served.files.path}", "only `distill serve` does"
    temperature, size = config.loss.temperature, served.files.vocab_size
    if needs_hidden(config):
        asked = f"loss.support={config.loss.support.value}"
        asked = asked if config.loss.needs_hidden else "rollout.save_scores=hidden"
        yield f"{asked}: {at} is a {VLLM.shown}, which returns no hidden states ({only}); leave it out"
    if temperature != 1.0:
        what = f"{at} is a {VLLM.shown}, which does not divide logits by a temperature"
        yield f"loss.temperature={temperature:g}: {what} ({only}); set it to 1"
    if vocabulary is not None and vocabulary.limit is not None and vocabulary.limit < size:
        what = f"its model has {size} ids, of which the student shares those below {vocabulary.limit}"
        yield f"{at}: {what}: a {VLLM.shown} cannot leave the others out ({only}); give a pair of the same size"

    async def ask() -> list[str]:
        servers = replicas(config.model.teacher, VLLM)
        try:
            found = [problem] if (problem := await vllm_teachers.mode_problem(servers)) else []
            if tokenizer is not None and (problem := await vllm_teachers.tokenizer_problem(servers, tokenizer.folder)):
                found.append(problem)
            return found
        finally:
            await servers.close()

    try:
        yield from (f"{at}: {problem}" for problem in asyncio.run(ask()))
    except ConfigError as error:
        yield from (f"{key}.url: {problem}" for problem in error.problems)
    except DistillError as error:
        yield f"{key}.url: {error}"


def slowness(served: Served, *, key: str) -> str:
    """Return the warning that a server of vLLM is slower than one of `distill serve`."""
    why = "it sends the scores of all tokens, the prompt's too, as JSON"
    what = f"{served.files.path} is a {VLLM.shown} ({served.version})"
    return f"{key}.url: {what}, which is slower than `distill serve`: {why}"
