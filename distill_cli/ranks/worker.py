"""The program of a torchrun rank: `python -m distill_cli.ranks.worker RUN --attempt N [--checkpoint FOLDER | --check]`.

All output of a rank and its libraries goes to the rank's log, except lines for the user, which the main rank writes to
its standard output. A rank on GPUs imports torch after that redirection; one on CPUs is forked from an agent that has
called `prepare`. An evaluation's folder runs `eval_rank`, `--check` `check_rank`, and otherwise `build_trainer` trains.
"""

import argparse
import gc
import importlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO

from distill_cli.config.derived import needs_sampler, needs_scorer
from distill_cli.config.variation import load_config
from distill_cli.engines.process_setup import import_transformers, prepare_process
from distill_cli.engines.vllm_patches import apply_patches
from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.machine.processes import die_with_torchrun
from distill_cli.terminal.console import RankOutput
from distill_cli.terminal.step_printer import log_to


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rank; on an error write it to the rank's error file and exit with status 1."""
    arguments, rank = parse(argv), int(os.environ["RANK"])
    run = RunDir(arguments.run, attempt=arguments.attempt)
    die_with_torchrun()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    console = redirect_output(run.rank_log(rank), is_main=rank == 0)
    try:
        run_program(run, console, arguments)
        for stream in (console, sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)  # everything is on disk, and the interpreter takes seconds to free millions of objects
    except Exception as error:
        try:
            traceback.print_exc()
            message, kind = " ".join(str(error).split()), type(error).__name__
            if not isinstance(error, DistillError):
                message = f"{kind}: {message}"
            write_json(run.rank_error(rank), {"time": time.time(), "message": message[:2000], "kind": kind})
            sys.stderr.flush()
        finally:
            os._exit(1)  # other ranks may wait in a collective that this one will never enter


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a rank's arguments; None are the process's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--check", action="store_true")
    return parser.parse_args(argv)


def prepare(argv: Sequence[str]) -> None:
    """Import what ranks with these arguments will need, before they are forked."""
    log_to(sys.stderr)
    arguments = parse(argv)
    run = RunDir(arguments.run)
    import_program(run, is_check=arguments.check)
    import torch

    config = load_config(run.config)
    if arguments.check or run.evaluation.exists() or needs_sampler(config) or needs_scorer(config):
        with no_garbage(), torch.random.fork_rng(devices=[]):  # vLLM's imports draw from torch's generator
            apply_patches()


def import_program(run: RunDir, *, is_check: bool) -> ModuleType:
    """Import the module that a rank runs, with its libraries but vLLM, and return it. A second call is quick."""
    with no_garbage():
        prepare_process()
        import_transformers()
        kind = "check_rank" if is_check else "eval_rank" if run.evaluation.exists() else "build_trainer"
        return importlib.import_module(f"distill_cli.ranks.{kind}")


@contextmanager
def no_garbage() -> Iterator[None]:
    """Turn the garbage collector off in the block; it never searches the objects that exist afterwards.

    Searching the millions that imports make costs a second, and nothing is found.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_program(run: RunDir, console: IO[str], arguments: argparse.Namespace) -> None:
    """Check, evaluate or train."""
    program = import_program(run, is_check=arguments.check)
    if arguments.check:
        program.check_rank(run, console)
    elif run.evaluation.exists():
        program.evaluate_rank(run, console)
    else:
        program.run_rank(run, console, checkpoint=arguments.checkpoint)


def redirect_output(log_file: Path, *, is_main: bool) -> IO[str]:
    """Redirect standard output and error, C code's included, to the log; return the stream that the user sees."""
    output = RankOutput(os.dup(1), "w") if is_main else open(os.devnull, "wb", buffering=0)  # noqa: SIM115
    console = io.TextIOWrapper(io.BufferedWriter(output), encoding="utf-8", errors="replace", line_buffering=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    log_to(sys.stderr, console=console if is_main else None)
    return console


if __name__ == "__main__":
    main()
