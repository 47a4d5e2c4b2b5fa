"""What overrides change of a run that is evaluated, resumed or replayed; no ranks are started."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from distill_cli import cli
from distill_cli.config.compose import compose
from distill_cli.config.variation import load_config
from distill_cli.data.recorded_run import FACTS, STEP, Facts, step_folder, temporary_folder
from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import Element, RunDir, SweepDir
from distill_cli.jobs.new_runs import prepare, resolve_jobs
from distill_cli.jobs.run_jobs import reopen, replay_job, replay_jobs, resolve_resumed
from distill_cli.terminal.console import Console
from distill_cli.track.base import enabled


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


def test_a_list_changes_resumed_trackers(run: RunDir) -> None:
    words = ["tracker=[wandb,tensorboard]", "tracker.wandb.mode=offline"]
    resolved, _ = resolve_resumed(run, words, console=Console())
    assert list(enabled(resolved.config)) == ["wandb", "tensorboard"]


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


def test_a_swept_replay_is_every_combination(recorded: RunDir) -> None:
    jobs = replay_jobs(recorded, ["loss=forward,reverse", "loss.topk=8,16", "train.lr=1e-4"], is_sweep=True)
    assert [job.swept for job in jobs] == [
        [f"loss={loss}", f"loss.topk={topk}"] for loss in ("forward", "reverse") for topk in (8, 16)
    ]
    assert {job.config.rollout.replay for job in jobs} == {str(recorded.path)}
    assert [(job.config.loss.kl_type, job.config.loss.topk) for job in jobs][1:3] == [("forward", 16), ("reverse", 8)]
    assert {job.config.train.lr for job in jobs} == {1e-4}
    assert not any(job.config.rollout.replay_shuffle for job in jobs)
    assert [one.config.loss.topk for one in resolve_jobs(jobs)[1]] == [8, 16, 8, 16]


def test_swept_seeds_shuffle_a_replay(recorded: RunDir) -> None:
    def shuffles(*overrides: str, is_sweep: bool = True) -> set[bool]:
        return {job.config.rollout.replay_shuffle for job in replay_jobs(recorded, overrides, is_sweep=is_sweep)}

    assert shuffles("train.seed=1,2") == {True}
    assert shuffles("train.seed=1,2", "rollout.replay_shuffle=false") == {False}
    assert shuffles("train.seed=1", "loss.topk=8,16") == {False}
    assert shuffles("train.seed=1", is_sweep=False) == {False}


def test_a_seed_without_effect_is_named(recorded: RunDir) -> None:
    def warned(*overrides: str) -> bool:
        (_, (resolved,)) = resolve_jobs(
            replay_jobs(recorded, [*overrides, "loss.topk=16", "train.seed=1"], is_sweep=False)
        )
        return any("train.seed has no effect" in warning for warning in resolved.warnings)

    assert warned()
    assert warned("eval.at_end=true")  # greedy
    assert not warned("eval.at_end=true", "eval.temperature=1")
    assert not warned("rollout.replay_shuffle=true")
    assert not warned("model.student.lora.rank=2")


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["loss=forward"], ["nothing is swept"]),
        ([], ["nothing is swept"]),
        (["loss=forward,revers", "los.topk=8,16"], ["loss=revers: no such choice", "los.topk: unknown key"]),
        (["train.lr=interval(1e-5,1e-3)"], ["search.trials"]),
    ],
)
def test_wrong_sweeps_of_replays_are_refused(recorded: RunDir, overrides: list[str], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        replay_jobs(recorded, overrides, is_sweep=True)
    assert len(error.value.problems) == len(problems)
    assert all(part in problem for part, problem in zip(problems, error.value.problems, strict=True))


def test_each_combination_is_checked(recorded: RunDir) -> None:
    jobs = replay_jobs(recorded, ["loss.topk=8,17,18", "loss.temperature=1,2"], is_sweep=True)
    with pytest.raises(ConfigError) as error:
        resolve_jobs(jobs)
    assert sorted(problem.partition(":")[0] for problem in error.value.problems) == [
        "loss.temperature=2.0",
        "loss.topk=17",
        "loss.topk=18",
    ]


def test_several_values_need_a_sweep(recorded: RunDir) -> None:
    with pytest.raises(ConfigError, match="loss.topk: several values are a sweep: add -m"):
        replay_jobs(recorded, ["loss.topk=8,16"], is_sweep=False)
