"""Write a checkpoint as a Hugging Face folder.

Sharded safetensors, config, generation config, tokenizer, chat template and a model card; transformers, vLLM and
`distill eval` load it. One process, no GPU, no more memory than the largest tensor needs.

examples
  distill export runs/latest
  distill export runs/latest student_40 --step 40
  distill export runs/latest best --step best
"""

import re
from pathlib import Path

from distill_cli.errors import ConfigError, DistillError
from distill_cli.verbs.command_line import Arguments, Parser, given


def declare(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="its folder, such as runs/latest")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="written; by default in RUN/export")
    parser.add_step("best", "last", help="a step, the best by checkpoint.metric, or the last (default)")
    text = "of one file, such as 500MB; 5GB if not given"
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help=text)
    parser.add_argument("--adapter", action="store_true", help="of a LoRA student: the adapter alone, as peft has it")
    parser.add_argument("--push", type=given, metavar="NAME", help="to the hub, under this name")


def main(arguments: Arguments) -> int:
    """Export one checkpoint; return the exit status.

    Raises:
        ConfigError: no such run or checkpoint, the folder exists, or the run has no adapters for `--adapter`.
        DistillError: it could not be written, or not be pushed.
    """
    from distill_cli.checkpoint import store
    from distill_cli.folders.run_dir import open_run
    from distill_cli.resolved import ResolvedRun
    from distill_cli.terminal.console import Console

    run, as_adapter = open_run(Path(arguments.run)), arguments.adapter
    resolved, console = ResolvedRun.read(run, needs_teacher=False), Console(highlight=False, soft_wrap=True)
    which, settings = arguments.step or "last", resolved.config.checkpoint
    checkpoint = store.choose(run.checkpoints, which, settings, warn=console.warn)
    if as_adapter and not resolved.config.model.student.lora.is_on:
        raise ConfigError(f"--adapter: {run.path} trained all weights (model.student.lora.rank=null); leave it out")
    folder = arguments.folder or run.path / "export" / (checkpoint.path.name + ("_adapter" if as_adapter else ""))
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; give another folder")
    store.check_base(checkpoint, resolved.student)
    from distill_cli.checkpoint.hf_export import write_folder  # imports torch

    write_folder(checkpoint, resolved, folder, as_adapter=as_adapter, max_file_bytes=arguments.max_shard_size)
    console.print(f"{'adapter' if as_adapter else 'student'} of step {checkpoint.step}: {folder}")
    if arguments.push:
        push(folder, arguments.push)
        console.print(f"pushed to {arguments.push}")
    return 0


def parse_size(text: str) -> int:
    """Return the bytes of 5GB, 500MB and the like."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text}: must be a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2].upper())))


def push(folder: Path, name: str) -> None:
    """Upload the folder to the hub, with the token that `huggingface-cli login` keeps."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # offline, no token, no such name: the hub's library raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DistillError(f"--push {name}: {reason}; the folder is written: {folder}") from error
