"""Watching a run from its files: what is printed, when it ends, and that it leaves the run alone."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from distill_cli.config.compose import compose
from distill_cli.config.variation import save_config
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.jobs.submit import follow
from distill_cli.terminal.step_printer import Screen, sparks


def row(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 100.0 + 2 * step, "train/loss": 1.0 / (step + 1), **metrics}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.logs.mkdir(parents=True)
    made.torchrun_log(0).touch()  # it has begun
    save_config(compose(["train.max_steps=1000"])[0].config, made.config)
    made.metrics.write_text(row(0, **{"val/accuracy": 0.25}) + row(1))
    return made


def test_a_run_is_followed(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def next_moment(_seconds: float) -> None:
        have = len(run.metrics.read_text().splitlines())
        if have == 4:
            write_json(run.outcome, {"state": "finished"})
            return
        run.heartbeat.write_text("train 4")
        with run.metrics.open("a") as file:
            file.write(row(have))

    with run.lock():
        assert follow(run, sleep=next_moment) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0/1000 loss=1.0000 val=0.250"
    assert [line.split(" ")[1] for line in lines[:4]] == ["0/1000", "1/1000", "2/4", "3/4"]
    assert lines[4] == "verdict  Nothing looks wrong in these 3 steps."
    assert lines[-1].startswith(f"finished after step 3; distill report {run.path}")


def test_failures_and_restarts_are_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    moments = iter((lambda: run.metrics.write_text(row(0)), lambda: run.metrics.write_text(row(0) + row(1)), None))
    lock = run.lock()
    lock.__enter__()

    def next_moment(_seconds: float) -> None:
        moment = next(moments)
        if moment is None:
            lock.__exit__(None, None, None)
        else:
            moment()

    assert follow(run, sleep=next_moment) == 1
    stdout = capsys.readouterr().out
    assert "goes on from the checkpoint of step 0" in stdout
    assert stdout.count("step 1/1000") == 2
    assert f"failed after step 1; distill resume {run.path} goes on" in stdout


def test_a_requeued_job_is_waited_for(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(run.job, {"launcher": "slurm", "job_id": "7", "log": ""})
    write_json(run.outcome, {"state": "stopped"})  # preempted
    moments = iter(
        (
            lambda: run.outcome.unlink(),  # its next attempt has begun
            lambda: run.metrics.write_text(row(0) + row(1) + row(2)),
            lambda: write_json(run.outcome, {"state": "stopped"}),
            lambda: write_json(run.job_end, {"job_id": "7", "status": 143, "error": None}),  # for good
        )
    )
    with run.lock():
        assert follow(run, sleep=lambda _seconds: next(moments)()) == 0
    stdout = capsys.readouterr().out
    assert "step 2/1000" in stdout
    assert stdout.splitlines()[-1].startswith("stopped after step 2")


def test_ctrl_c_leaves_the_run_alone(run: RunDir) -> None:
    metrics = {"val/accuracy": 0.5, "perf/tokens_per_s": 2300.0, "time/step_s": 0.8, "perf/peak_mem_gib": 1.25}
    run.metrics.write_text(row(0, **{"val/accuracy": 0.25}) + row(1) + row(2, **metrics))
    run.heartbeat.write_text("sample 12")
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                shown.extend(os.read(ours, 1 << 16))
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()
    with run.lock():
        process = subprocess.Popen(
            [sys.executable, "-m", "distill_cli", "watch", str(run.path)],
            stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )  # fmt: skip
        os.close(theirs)
        wanted = (
            "step 2/12",
            "sample",
            "2,300 tokens/s",
            "1.25 GiB",
            "50.0% held out",
            "0:20 left",
            "25.0% at the start",
        )
        deadline = time.monotonic() + 60
        while not all(words.encode() in shown for words in wanted):
            assert time.monotonic() < deadline, shown.decode()
            assert process.poll() is None, shown.decode()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert b"the run is running" in shown


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["nowhere"], ["--help-me"]])
def test_only_a_run_is_watched(argv: list[str]) -> None:
    from distill_cli import cli

    assert cli.run(["watch", *argv]) == 2


def test_time_left_follows_the_pace() -> None:
    screen = Screen("x", 10)
    assert screen.seconds_left() is None
    for step in range(3):
        screen.add(step, {"train/loss": 1.0}, at=10.0 * step)
    assert screen.seconds_left() == 80
    console = Console(file=io.StringIO(), width=80)
    console.print(screen)
    assert "about 1:20 left" in console.file.getvalue()


def test_sparks_span_the_values() -> None:
    assert sparks([0, 1, 2, 7]) == "▁▂▃█"
    assert sparks([3, 3]) == "▁▁"
    assert sparks([3]) == ""
