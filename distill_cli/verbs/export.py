"""`distill export RUN [DIR] [--step N|best|last] [--adapter] [--max-shard-size 5GB] [--push NAME]`: a checkpoint as a
Hugging Face folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.errors import ConfigError, DistillError
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.verbs.resume import check_base, open_run

MAX_SHARD_SIZE = "5GB"
"""Of one safetensors file, as the hub likes them."""
OPTIONS = ("--step", "--max-shard-size", "--push")


def export(argv: Sequence[str]) -> int:
    """The verb; its exit status.

    Raises:
        ConfigError: no such run or checkpoint, the folder exists, or there are no adapters where they are asked for.
        DistillError: it could not be written, or not be pushed.
    """
    words, options = _arguments(argv)
    run = open_run(Path(words[0]))
    found, which = ResolvedRun.read(run, needs_teacher=False), options.get("--step", "last")
    max_file_bytes = parse_size(options.get("--max-shard-size", MAX_SHARD_SIZE))
    settings, console = found.config.checkpoint, Console(highlight=False, soft_wrap=True)
    try:
        checkpoint = store.choose(
            run.checkpoints,
            which,
            metric=settings.metric,
            higher_is_better=settings.keeps_highest,
            warn=lambda text: console.print(f"warning: {escape(text)}"),
        )
    except DistillError as error:
        raise ConfigError(str(error)) from error
    as_adapter = "--adapter" in options
    if as_adapter and not found.config.model.student.lora.is_on:
        raise ConfigError(f"--adapter: {words[0]} trained all weights (model.student.lora.rank=null); leave it out")
    name = checkpoint.path.name + ("_adapter" if as_adapter else "")
    folder = Path(words[1]) if len(words) > 1 else run.path / "export" / name
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; give another folder")
    check_base(checkpoint, found.student)
    from distill_cli.checkpoint.hf_export import write_folder  # imports torch

    write_folder(checkpoint, found, folder, as_adapter=as_adapter, max_file_bytes=max_file_bytes)
    console.print(f"{'adapter' if as_adapter else 'student'} of step {checkpoint.step}: {folder}")
    if "--push" in options:
        push(folder, options["--push"])
        console.print(f"pushed to {options['--push']}")
    return 0


def _arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    words, options, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        name, is_joined, value = word.partition("=")
        if word == "--adapter":
            options[word] = "true"
        elif name in OPTIONS:
            options[name] = value if is_joined else (rest.pop(0) if rest else "")
            if not options[name]:
                raise ConfigError(f"{name}: a value is needed")
        elif word.startswith("-"):
            raise ConfigError(f"{word}: `distill export` takes a run, a folder, --adapter, {', '.join(OPTIONS)}")
        else:
            words.append(word)
    if not 1 <= len(words) <= 2:
        raise ConfigError("distill export: give a run's folder, such as runs/latest, and perhaps a folder to write")
    return words, options


def parse_size(text: str) -> int:
    """Bytes of 5GB, 500MB and the like."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--max-shard-size {text}: must be a size such as 5GB or 500MB")
    return int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2].upper())))


def push(folder: Path, name: str) -> None:
    """The folder to the hub, under the token that `huggingface-cli login` keeps."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # offline, no token, no such name: the hub's library raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DistillError(f"--push {name}: {reason}; the folder is written: {folder}") from error
