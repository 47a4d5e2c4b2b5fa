"""What a run tells to type next, alone and as one of a sweep; its ranks are doubles."""

import io
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distill_cli.config.compose import Job, compose
from distill_cli.config.variation import override
from distill_cli.errors import Stopped, TeacherLost
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.jobs import prepared_run, run_jobs
from distill_cli.jobs.new_runs import prepare, resolve_jobs
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console

FinishRanks = Callable[[str | None], None]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FinishRanks:
    """Let ranks finish at once, stop for a reason, or be stopped by a signal."""

    def end(how: str | None) -> None:
        def start_ranks(_resolved: ResolvedRun, run: RunDir, *_: object, **__: object) -> None:
            if how == "SIGINT":
                raise Stopped(signal.SIGINT)
            write_json(run.outcome, {"state": "stopped" if how else "finished", "reason": how, "num_steps": 1})
            run.metrics.touch()

        monkeypatch.setattr(prepared_run, "start_ranks", start_ranks)

    monkeypatch.chdir(tmp_path)
    return end


def checked(*overrides: str, flags: tuple[str, ...] = ()) -> tuple[list[Job], list[ResolvedRun]]:
    return resolve_jobs(compose([*overrides, "run.name=r", "tracker=none"], flags))


def carry_out(*overrides: str, console: Console) -> None:
    """Carry out a run_jobs."""
    jobs, resolved = checked(*overrides, flags=("--multirun",))
    folder = run_jobs.new_sweep(jobs[0].config)
    runs = run_jobs.add_runs(folder, jobs, resolved, command=["distill", "-m", *overrides, "tracker=none"], space={})
    run_jobs.carry_out_sweep(runs, console=console)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def lines(console: Console, key: str) -> list[str]:
    """Return what follows a word in the printed lines, up to a panel's edge."""
    assert isinstance(console.file, io.StringIO)
    found = [line.strip("│ ").partition(key) for line in console.file.getvalue().splitlines()]
    return [after.strip() for before, word, after in found if word and not before]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ["distill chat runs/r", "distill eval runs/r --against before teacher"]),
        (("data.verifier=null",), ["distill chat runs/r"]),
        (
            ("loss=reverse", "rollout.save_scores=true", "data.validation=null"),
            ["distill replay runs/r loss=forward", "distill chat runs/r"],
        ),
    ],
)
def test_next_commands_are_short(
    overrides: tuple[str, ...], expected: list[str], ranks: FinishRanks, console: Console
) -> None:
    (job,), (resolved,) = checked(*overrides)
    run = prepare(resolved, Path("runs/r"), command=["distill", *job.overrides])
    ranks(None)
    prepared_run.run_to_completion(resolved, run, console=console)
    assert isinstance(console.file, io.StringIO)
    printed = [line.strip("│ ").removeprefix("next").strip() for line in console.file.getvalue().splitlines()]
    assert [line for line in printed if line.startswith("distill ")] == expected


@pytest.mark.parametrize("nodes", [0, 1])
def test_lost_teachers_with_jobs_come_again(
    nodes: int, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not there at the start of the first attempt, and lost in the second; a teacher without a job ends the run."""
    monkeypatch.chdir(tmp_path)
    (job,), (resolved,) = checked("train.max_steps=1")
    run = prepare(resolved, Path("runs/r"), command=["distill", *job.overrides])
    resolved = replace(resolved, config=override(resolved.config, {"model.teacher.nodes": nodes}))
    attempts: list[int] = []

    def start_ranks(_resolved: ResolvedRun, run: RunDir, *_: object, **__: object) -> None:
        attempts.append(run.attempt)
        if len(attempts) == 1:
            raise TeacherLost("no scoring server answered")
        state = "failed" if len(attempts) == 2 else "finished"
        write_json(run.outcome, {"state": state, "reason": "lost" if state == "failed" else None, "num_steps": 1})
        run.metrics.touch()

    monkeypatch.setattr(prepared_run, "start_ranks", start_ranks)
    if nodes:
        assert prepared_run.run_to_completion(resolved, run, console=console).is_finished
    else:
        with pytest.raises(TeacherLost):
            prepared_run.run_to_completion(resolved, run, console=console)
    assert attempts == ([1, 2, 3] if nodes else [1])


def test_a_stopped_sweep_is_resumed_whole(ranks: FinishRanks, console: Console) -> None:
    ranks("SIGINT")
    with pytest.raises(Stopped):
        carry_out("loss.topk=4,8", console=console)
    (line,) = lines(console, "stopped:")
    assert "distill resume runs/r goes on" in line


def test_unfinished_runs_of_a_sweep_resume(ranks: FinishRanks, console: Console) -> None:
    ranks("checkpoint.must_save_by")
    carry_out("loss.topk=4,8", console=console)
    assert set(lines(console, "go on")) == {"distill resume runs/r"}
