"""Write a checkpoint as a Hugging Face folder.

Sharded safetensors, config, generation config, tokenizer, chat template and a model card; transformers, vLLM and
`distill eval` load it. One process, no GPU, no more memory than the largest tensor needs.

examples
  distill export runs/latest
  distill export runs/latest student_40 --step 40
  distill export runs/latest best --step best
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.errors import ConfigError, DistillError
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import Parser, given
from distill_cli.verbs.resume import check_base, open_run


def declare(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="its folder, such as runs/latest")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="written; by default in RUN/export")
    parser.takes_step(default="last")
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="of one file, such as 500MB; 5GB if not given",
    )
    parser.add_argument("--adapter", action="store_true", help="of a LoRA student: the adapter alone, as peft has it")
    parser.add_argument("--push", type=given, metavar="NAME", help="to the hub, under this name")


def main(arguments: argparse.Namespace) -> int:
    """Export one checkpoint; return the exit status.

    Raises:
        ConfigError: no such run or checkpoint, the folder exists, or there are no adapters where they are asked for.
        DistillError: it could not be written, or not be pushed.
    """
    run, as_adapter = open_run(Path(arguments.run)), arguments.adapter
    found, console = ResolvedRun.read(run, needs_teacher=False), Console(highlight=False, soft_wrap=True)
    settings = found.config.checkpoint
    try:
        checkpoint = store.choose(
            run.checkpoints,
            arguments.step,
            metric=settings.metric,
            higher_is_better=settings.keeps_highest,
            warn=lambda text: console.print(f"warning: {escape(text)}"),
        )
    except DistillError as error:
        raise ConfigError(str(error)) from error
    if as_adapter and not found.config.model.student.lora.is_on:
        raise ConfigError(
            f"--adapter: {arguments.run} trained all weights (model.student.lora.rank=null); leave it out"
        )
    name = checkpoint.path.name + ("_adapter" if as_adapter else "")
    folder = arguments.folder or run.path / "export" / name
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; give another folder")
    check_base(checkpoint, found.student)
    from distill_cli.checkpoint.hf_export import write_folder  # imports torch

    write_folder(checkpoint, found, folder, as_adapter=as_adapter, max_file_bytes=arguments.max_shard_size)
    console.print(f"{'adapter' if as_adapter else 'student'} of step {checkpoint.step}: {folder}")
    if arguments.push:
        push(folder, arguments.push)
        console.print(f"pushed to {arguments.push}")
    return 0


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
