"""A run followed through its files, and its job through the queue: what `distill watch` shows."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from distill_cli.config.variation import load_config
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.submit import POLL_S as QUEUE_POLL_S
from distill_cli.jobs.submit import lost_job_reason
from distill_cli.report.read import state_of
from distill_cli.terminal.step_printer import StepPrinter

POLL_S = 0.5
GOING_ON = ("waiting", "running")


def follow(run: RunDir, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show the recorded steps and the new ones until the run has ended; return 1 if it failed, else 0.

    The queue is polled too: a job that the cluster killed leaves nothing in the run's files.
    """
    num_steps = load_config(run.config).train.max_steps
    with StepPrinter(sys.stdout, num_steps=num_steps, title=f"distill watch  {run.path.name}") as printer:
        last, polled, lost = -1, -math.inf, None
        while True:
            if time.monotonic() >= polled + QUEUE_POLL_S[1]:
                polled, lost = time.monotonic(), lost_job_reason(run)
            state = state_of(run)  # read before the rows, so that no row of a run that has ended is missed
            if state == "stopped" and run.open_job() and not lost:
                state = "waiting"  # the job has not written that it ended: the cluster will start it again
            elif state in GOING_ON and lost:
                state = "failed"
            now = run.newest_attempt().now()
            if now is not None:
                printer.expect(now[1])
            if state == "waiting" or now is not None:
                printer.stage(now[0] if now and state == "running" else state)
            rows = read_metrics(run.metrics) if run.metrics.exists() else []
            if rows and rows[-1]["step"] < last:
                last = int(rows[-1]["step"])
                printer.say(f"the run goes on from the checkpoint of step {last}")
            for row in [row for row in rows if row["step"] > last]:
                last = int(row["step"])
                metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
                printer.step(last, metrics, at=row["time"])
                printer.screen.began = min(printer.screen.began, rows[0]["time"])
            if state not in GOING_ON:
                break
            sleep(POLL_S)
    if lost:
        print(lost)
    verb, does = ("report", "shows its results") if state == "finished" else ("resume", "goes on")
    print(f"{state} after step {max(last, 0)}; distill {verb} {run.path} {does}")
    return int(state == "failed")
