"""What each torchrun rank runs: `python -m distill_cli.ranks.worker RUN --attempt N [--checkpoint FOLDER | --check]`.

Whatever a rank or a library prints goes to the rank's log; the main rank's standard output is kept for the lines that
are meant for the user. Only then is torch imported, and `build` makes the trainer; where the
folder is an evaluation's, `ranks.eval` asks a model.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import IO

from distill_cli.engines.process_setup import hide_broken_packages, import_transformers, prepare_process
from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.machine.processes import die_with_torchrun
from distill_cli.terminal.console import RankOutput
from distill_cli.terminal.step_printer import log_to


def main() -> None:
    arguments, rank = parser().parse_args(), int(os.environ["RANK"])
    run = RunDir(arguments.run, attempt=arguments.attempt)
    die_with_torchrun()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    console = redirect_output(run.rank_log(rank), is_main=rank == 0)
    try:
        prepare_process()
        hide_broken_packages()
        import_transformers()
        if arguments.check:
            from distill_cli.ranks.check_rank import check_rank

            check_rank(run, console)
        elif run.evaluation.exists():
            from distill_cli.ranks.eval_rank import evaluate_rank

            evaluate_rank(run, console)
        else:
            from distill_cli.ranks.build_trainer import run_rank

            run_rank(run, console, checkpoint=arguments.checkpoint)
    except Exception as error:
        try:
            traceback.print_exc()
            message = " ".join(str(error).split())
            if not isinstance(error, DistillError):
                message = f"{type(error).__name__}: {message}"
            error_file = {"time": time.time(), "message": message[:2000], "kind": type(error).__name__}
            write_json(run.rank_error(rank), error_file)
            sys.stderr.flush()
        finally:
            os._exit(1)  # other ranks may stand in a collective that this one will never enter


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--attempt", type=int, required=True)
    arguments.add_argument("--checkpoint", type=Path)
    arguments.add_argument("--check", action="store_true")
    return arguments


def redirect_output(log_file: Path, *, is_main: bool) -> IO[str]:
    """Standard output and error into the log, C code's too; returns the stream that the user sees."""
    output = RankOutput(os.dup(1), "w") if is_main else open(os.devnull, "wb", buffering=0)  # noqa: SIM115
    console = io.TextIOWrapper(io.BufferedWriter(output), encoding="utf-8", errors="replace", line_buffering=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    log_to(sys.stderr, console=console if is_main else None)
    return console


if __name__ == "__main__":
    main()
