"""distill: on-policy distillation of language models from one command.

usage: distill [VERB] [OVERRIDE ...]

{verbs}

examples
  distill                                              the embedded pair, on this machine's CPU
  distill model=qwen3_1.7b_4b loss=mixed data.train.path=train.jsonl data.validation.path=test.jsonl
  distill -m loss.topk=32,64 loss.kl_weight=0.3,0.5    a sweep
  distill cluster=slurm cluster.nodes=2 cluster.slurm.partition=gpu model=qwen3_1.7b_4b ...

`distill VERB --help` lists a verb's flags, `distill --version` prints the version. Overrides are Hydra's:
group=choice, key=value; -m, --cfg, --info and `eval "$(distill -sc install=bash)"` for tab completion work as in
any Hydra application. Set DISTILL_DEBUG=1 for tracebacks.

Exit status: 0 done; 1 a failure while running; 2 wrong input; 130 and 143 stopped by Ctrl-C and SIGTERM; 141 the
reader of the output closed it, as `head` does.
"""

import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence

from distill_cli.config.choices import nearest
from distill_cli.config.flags import ANSWERED
from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.verbs.command_line import VERBS, complete, is_completion, module_of, parser_of, text


def main() -> None:
    """Run the console script."""
    if any(word.split("=")[0] in ANSWERED for word in sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Hydra answers these, and would log a broken pipe
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        from distill_cli.terminal.console import READER_GONE, discard  # imports Rich

        discard()
        status = READER_GONE
    if "torch" not in sys.modules:  # whose bindings would report what is left as leaked
        gc.freeze()  # else the interpreter's end collects garbage several times: a second after MLflow was imported
    sys.exit(status)


def run(argv: Sequence[str]) -> int:
    """Run one command line; return its exit status."""
    try:
        if is_completion(argv, os.environ) and not complete():
            return 0
        return run_verb(argv)
    except KeyboardInterrupt:
        return 130
    except Stopped as stopped:
        print(f"stopped by {stopped}; no process was left behind", file=sys.stderr)
        return 128 + stopped.signum
    except (DistillError, OSError) as error:
        problems = problems_of(error)
        if not problems or os.environ.get("DISTILL_DEBUG"):
            raise
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def problems_of(error: DistillError | OSError) -> Sequence[str]:
    """Return what to print of an error, a line each; nothing if it is a defect of distill."""
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, DistillError):
        return [str(error)]
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return []
    where = f" ({error.filename})" if error.filename else ""
    return [f"the disk is full{where}; free some space, then type `distill resume RUN`"]


def run_verb(argv: Sequence[str]) -> int:
    """Parse a command line and run its verb; return the exit status."""
    verb, words = split_verb(argv)
    wants_help = not {"--help", "-h"}.isdisjoint(words)
    if wants_help and len(words) == len(argv):  # no verb
        summaries = {name: text(name).splitlines()[0] for name in VERBS}
        verbs = "\n".join(f"  {name:<9}{summary}" for name, summary in summaries.items())
        print((__doc__ or "").format(verbs=verbs), end="")
        return 0
    parser = parser_of(verb)
    if wants_help:
        print(parser.format_help(), end="")
        return 0
    arguments = parser.parse(words)
    arguments.command = ["distill", *argv]
    return module_of(verb).main(arguments)


def split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb, `train` if none was typed, and the words after it.

    Raises:
        ConfigError: the first word is neither a verb nor an override.
    """
    if not argv or argv[0].startswith(("-", "+", "~")) or "=" in argv[0]:
        return "train", list(argv)
    if argv[0] not in VERBS:
        known = f"there are: {', '.join(VERBS)}; an override is key=value"
        raise ConfigError(f"{argv[0]}: no such verb{nearest(argv[0], VERBS)} ({known})")
    return argv[0], list(argv[1:])
