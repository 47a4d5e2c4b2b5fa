"""Follow a run in progress, wherever it runs.

Reads the run's own files, so a job on another machine can be followed if its folder is visible here. Ends when the run
ends; Ctrl-C leaves the run alone.

examples
  distill watch runs/latest
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.submit import POLL_S as QUEUE_POLL_S
from distill_cli.jobs.submit import lost_job_reason
from distill_cli.report.read import state_of
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.verbs.command_line import Parser

POLL_S = 0.5
GOING_ON = ("waiting", "running")


def declare(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="its folder, such as runs/latest")


def main(arguments: argparse.Namespace) -> int:
    """Follow a run until it ends; return the exit status, 1 if the run failed.

    Raises:
        ConfigError: there is no such run.
    """
    run = RunDir(Path(arguments.run).resolve())
    if not run.config.is_file():
        what = "no such folder" if not run.path.exists() else "no run is there (config.yaml is missing)"
        raise ConfigError(f"{arguments.run}: {what}; give the folder of a run, such as runs/latest")
    try:
        return follow(run)
    except KeyboardInterrupt:
        print(f"\nleft; the run is {state_of(run)}. distill watch {arguments.run} comes back to it", file=sys.stderr)
        return 130


def follow(run: RunDir, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show what is there and what comes, until the run has ended; return 1 if it failed, else 0.

    The queue of a submitted run is polled too: a job that Slurm killed leaves nothing in the files.
    """
    num_steps = load_config(run.config).train.max_steps
    with StepPrinter(sys.stdout, num_steps=num_steps, title=f"distill watch  {run.path.name}") as printer:
        last, asked, lost = -1, -math.inf, None
        while True:
            if time.monotonic() >= asked + QUEUE_POLL_S[1]:
                asked, lost = time.monotonic(), lost_job_reason(run)
            state = state_of(run)  # before the rows: what a run wrote before its end is all seen
            if state == "stopped" and run.open_job() and not lost:
                state = "waiting"  # the job has not written that it is over: the cluster will start it again
            elif state in GOING_ON and lost:
                state = "failed"
            now = run.newest_attempt().now()
            if now is not None:
                printer.expect(now[1])
            if state == "waiting" or now is not None:
                printer.stage(now[0] if state == "running" else state)
            rows = read_metrics(run.metrics) if run.metrics.exists() else []
            if rows and rows[-1]["step"] < last:  # it went back to a checkpoint
                printer.say(f"the run goes on from the checkpoint of step {rows[-1]['step']}")
                last = int(rows[-1]["step"])
            for row in rows:
                if row["step"] > last:
                    last = int(row["step"])
                    metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
                    printer.step(last, metrics, at=row["time"])
                    printer.screen.began = min(printer.screen.began, rows[0]["time"])
            if state not in GOING_ON:
                break
            sleep(POLL_S)
    if lost:
        print(lost)
    print(ending(run, state, last))
    return 1 if state == "failed" else 0


def ending(run: RunDir, state: str, step: int) -> str:
    said = f"{state} after step {max(step, 0)}"
    verb, does = ("report", "shows what came of it") if state == "finished" else ("resume", "goes on")
    return f"{said}; distill {verb} {run.path} {does}"
