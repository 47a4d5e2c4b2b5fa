"""Time the default command on the embedded pair; kill a second run and resume it."""

from __future__ import annotations

import json
import statistics
import time

import psutil

from gpu_stages.command import finish, metrics, start, timed
from gpu_stages.figures import Stage, StageFailed

KILLED_STEPS, KILL_AFTER = 8, 5
START_S = 120.0
WRONG_SHARE = 90.0
"""Fail below this percentage of the teacher's accuracy; on CPUs the default run reaches 98.8 to 99.6."""


def run(stage: Stage) -> None:
    runs = stage.scratch / "runs"
    short = ("train.max_steps=6", "eval.max_samples=32") if stage.rehearse else ()
    _, seconds = timed(stage, "run.name=whole", f"run.root={runs}", *short)
    outcome, rows = json.loads((runs / "whole" / "outcome.json").read_text()), metrics(runs / "whole")
    steps = [row for row in rows if row["step"] > 0]
    stage.record("default run, command to end", seconds, "s")
    stage.record("default run, a step (median)", statistics.median(row["time/step_s"] for row in steps), "s")
    for when in ("before", "after", "teacher"):
        stage.record(f"held-out problems right, {when}", outcome[when]["accuracy"] * 100, "%")
    share = outcome["after"]["accuracy"] / outcome["teacher"]["accuracy"] * 100
    stage.record("of the teacher's", share, "%", at_least=97)
    if not stage.rehearse and share < WRONG_SHARE:
        stage.fail(f"the student reached {share:.0f}% of the teacher's accuracy")
    worst = max(row["rollout/engine_mismatch"] for row in steps)
    stage.record("worst engine mismatch", worst, at_most=1e-3 if stage.rehearse else 2e-2, wrong_if_missed=True)
    kill_and_resume(stage)


def kill_and_resume(stage: Stage) -> None:
    """Kill a run after step 5 and resume it: metrics.jsonl must have every step once."""
    folder = stage.scratch / "runs" / "killed"
    started = start(
        stage,
        *("run.name=killed", f"run.root={folder.parent}", f"train.max_steps={KILLED_STEPS}", "checkpoint.period=2"),
        *("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0"),
        "rollout.carry_over=true",  # what is in flight is a part of the checkpoint
        *("engine.student.enforce_eager=true", "engine.teacher.enforce_eager=true"),  # two starts
    )
    begin = time.monotonic()
    while not any(row["step"] >= KILL_AFTER for row in metrics(folder)):
        if started.process.poll() is not None:
            finish(started)
            raise StageFailed(f"run.name=killed ended before step {KILL_AFTER}")
        if time.monotonic() - begin > START_S:
            raise StageFailed(f"run.name=killed had not reached step {KILL_AFTER} after {START_S:.0f} s")
        time.sleep(0.05)
    tree = psutil.Process(started.process.pid).children(recursive=True)
    started.process.kill()  # torchrun dies with the launcher, ranks with torchrun, engines with ranks
    started.process.wait()
    _, alive = psutil.wait_procs(tree, timeout=10)
    if alive:
        raise StageFailed(f"{len(alive)} processes survived their launcher")
    begin = time.perf_counter()
    finish(start(stage, "resume", str(folder), verb_only=True))
    steps = [row["step"] for row in metrics(folder) if row["step"] > 0]
    stage.record("killed and resumed, seconds to its end", time.perf_counter() - begin, "s")
    if steps != list(range(1, KILLED_STEPS + 1)):
        raise StageFailed(f"after a kill and a resume the steps are {steps}")
    mismatch = metrics(folder)[-1]["rollout/engine_mismatch"]
    limit = 1e-3 if stage.rehearse else 2e-2
    stage.record("engine mismatch after the resume", mismatch, at_most=limit, wrong_if_missed=True)
