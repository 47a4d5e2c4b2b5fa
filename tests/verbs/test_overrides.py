"""What overrides change of a run that is evaluated, resumed or replayed; no ranks are started."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from distill_cli import cli
from distill_cli.config.compose import compose
from distill_cli.config.variation import load_config
from distill_cli.data.recorded_run import FACTS, STEP, Facts, step_folder, temporary_folder
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import Element, RunDir, SweepDir
from distill_cli.jobs.new_runs import prepare, resolve_jobs
from distill_cli.jobs.run_jobs import reopen, replay_job, resolve_resumed
from distill_cli.terminal.console import Console


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has not begun, of the embedded pair."""
    _, (resolved,) = resolve_jobs(compose(["rollout.save_scores=true"]))
    return prepare(resolved, tmp_path / "sweep/run", command=["distill", "rollout.save_scores=true"])


@pytest.fixture
def recorded(run: RunDir) -> RunDir:
    """The run with one recorded step."""
    temporary = temporary_folder(run.scores, 1)
    temporary.mkdir(parents=True)
    (run.scores / FACTS).write_text(json.dumps(asdict(Facts(16, 1.0, [], [2], 512, None))))
    (temporary / STEP).write_text(json.dumps({"longest_response": 4, "longest_sequence": 8}))
    atomic_dir.seal(temporary, step_folder(run.scores, 1), atomic_dir.describe([temporary / STEP]))
    return run


@pytest.mark.parametrize("subject", ["package://tiny_pair/student", "run"])
def test_eval_names_its_own_key(subject: str, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    word = str(run.path) if subject == "run" else subject
    assert cli.run(["eval", word, "rollout.temperature=0.7"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.temperature=0.7" in line
    assert "set eval.temperature" in line


def test_a_choice_changes_a_resumed_run(run: RunDir) -> None:
    before = load_config(run.config)
    resolved, start = resolve_resumed(run, ["eval=default"], console=Console())
    assert start is None
    default = compose(["eval=default"])[0].config.eval
    assert resolved.config.eval == default != before.eval
    assert resolved.config.train == before.train


def test_a_choice_changes_a_resumed_sweep(run: RunDir) -> None:
    sweep, element = SweepDir(run.path.parent), Element(0, run.path.name, [])
    sweep.write(command=["distill"], elements=[element])
    assert [one.path for one in reopen(sweep, ["eval=default"], console=Console())] == [run.path]
    assert load_config(run.config).eval == compose(["eval=default"])[0].config.eval


def test_a_resumed_run_keeps_its_loss(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.config.read_text()
    assert cli.run(["resume", str(run.path), "loss.topk=8"]) == 2
    assert "loss.topk=8" in capsys.readouterr().err
    assert run.config.read_text() == before


def test_a_choice_changes_a_replay(recorded: RunDir) -> None:
    before = load_config(recorded.config).train
    job = replay_job(recorded, ["train=default", "loss=reverse"])
    default = compose(["train=default"])[0].config.train
    assert job.config.train == default != before
    assert (job.config.rollout.replay, job.config.loss.kl_type) == (str(recorded.path), "reverse")
    assert job.choices == {"model": "replay", "loss": "reverse"}
    assert replay_job(recorded, []).config.train.max_steps == 1
