"""`distill replay`: what a run recorded is trained on again, without any engine."""

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.report.pools import pools
from distill_cli.report.read import read_results
from tests.end_to_end.conftest import Finished, distill, refused

pytestmark = pytest.mark.slow

COMBINATIONS = [(loss, seed) for loss in ("forward", "reverse") for seed in (1, 4)]
NO_ENGINES = "raise ImportError('a replay asks no engine')"


def no_engines(folder: Path) -> dict[str, str]:
    """An environment in which vLLM cannot be imported."""
    (folder / "path/vllm").mkdir(parents=True)
    (folder / "path/vllm/__init__.py").write_text(NO_ENGINES)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "path"), os.environ.get("PYTHONPATH")]))}


def test_replay_of_same_loss_is_exact(one_rank: Finished, tmp_path: Path) -> None:
    done = distill(tmp_path, "replay", str(one_rank.run.path), "tracker=none", **no_engines(tmp_path))
    assert done.status == 0, done.stdout + done.stderr
    assert "3 recorded steps of" in done.stdout
    assert done.run.path.name.endswith("_replay_mixed")
    names = [name for name in one_rank.metrics[1] if name.startswith("train/")]
    names += ["rollout/accuracy", "rollout/mean_length", "rollout/truncated_rate"]
    for ours, theirs in zip(done.metrics[1:], one_rank.metrics[1:], strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
        assert ours["rollout/drift"] == theirs["rollout/engine_mismatch"]  # the student is the one that wrote
        assert not ours.keys() & {"time/sample_s", "time/score_s", "time/sync_s", "rollout/engine_mismatch"}
    ours, theirs = (load_file(of.run.student / "model.safetensors") for of in (done, one_rank))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.exhaustive
def test_replay_stops_resumes_and_starts_over(one_rank: Finished, tmp_path: Path) -> None:
    env = no_engines(tmp_path)
    other = (
        "loss=reverse",
        "loss.topk=8",
        "train.schedule=constant",
        "train.lr=2e-4",
        "tracker=none",
        "cluster.ranks_per_node=2",
    )
    done = distill(tmp_path, "replay", str(one_rank.run.path), *other, "train.max_steps=2", "run.name=r", **env)
    assert done.status == 0, done.stdout + done.stderr
    first = done.metrics[1]
    assert first["train/response_tokens"] == one_rank.metrics[1]["train/response_tokens"]
    assert first["train/kl_reverse"] == pytest.approx(first["train/loss"], rel=1e-4)
    assert first["train/teacher_topk_mass"] <= one_rank.metrics[1]["train/teacher_topk_mass"]
    done = distill(tmp_path, "resume", "runs/r", "train.max_steps=4", **env)
    assert done.status == 0, done.stdout + done.stderr
    rows = read_metrics(RunDir(tmp_path / "runs/r").metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["train/response_tokens"] == first["train/response_tokens"]  # the first recorded step again
    assert (
        rows[1]["rollout/drift"] < 1e-5 < 1e-3 < rows[4]["rollout/drift"]
    )  # the student is no longer the one that wrote
    assert json.loads((tmp_path / "runs/r/outcome.json").read_text())["state"] == "finished"


def test_a_sweep_of_replays_is_one_table(one_rank: Finished, tmp_path: Path) -> None:
    """Seeds 1 and 4 train on the recorded steps in different orders, and on the last one at the end."""
    swept = ("loss=forward,reverse", "train.seed=1,4", "tracker=none", "cluster.parallel_jobs=2")
    done = distill(tmp_path, "replay", "-m", str(one_rank.run.path), *swept, **no_engines(tmp_path))
    assert done.status == 0, done.stdout + done.stderr
    sweep = SweepDir(done.run.path)
    names = [element.folder for element in sweep.elements()]
    assert names == [f"{n}_loss={loss},seed={seed}" for n, (loss, seed) in enumerate(COMBINATIONS)]
    rows = [read_metrics(run.metrics) for run in sweep.runs()]
    tokens = [[row["train/response_tokens"] for row in run if row["step"]] for run in rows]
    recorded = [row["train/response_tokens"] for row in one_rank.metrics[1:]]
    assert tokens == [recorded, [recorded[1], recorded[0], recorded[2]]] * 2
    assert rows[0][3]["train/kl_forward"] != rows[1][3]["train/kl_forward"]

    table = done.stdout[done.stdout.index("\nloss ") :].splitlines()[1:]
    assert table[0].split()[:3] == ["loss", "seeds", "step"]
    kls = [row[3]["train/kl_forward"] for row in rows]
    for line, pool, ours in zip(table[1:3], pools(read_results([sweep.path])), (kls[:2], kls[2:]), strict=True):
        mean, half = sum(ours) / 2, 12.7062 * abs(ours[0] - ours[1]) / 2
        assert pool.mean("train/kl_forward").value == pytest.approx(mean)
        assert pool.mean("train/kl_forward").half == pytest.approx(half, rel=1e-4)
        assert line.split()[:3] == [pool.settings["loss"], "2", "3"]
        assert line.split()[4] == "±"
        assert line.split()[-3:] == [f"{sum(recorded):,.0f}", "±", "0"]
    assert "Student's t" in done.stdout
    assert "best KL forward" in done.stdout
    assert sweep.report.is_file()
    assert all(OmegaConf.load(run.config).rollout.replay_shuffle for run in sweep.runs())


def test_impossible_replays_are_refused(
    one_rank: Finished, two_ranks: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for argv, message in (
        ([], "required: RUN"),
        (["-m", "loss=forward,reverse"], "give one RUN"),
        (["runs/latest", "-m", "loss=reverse"], "nothing is swept"),
        (["runs/latest", "-m", "loss=forward,revers"], "loss=revers: no such choice"),
        (["runs/latest", "-m", "loss.topk=8,16", "loss.tpk=1"], "loss.tpk: unknown key"),
        (["runs/latest", "-m", "loss.topk=8,65"], "loss.topk=65: 16 tokens of the teacher were recorded"),
        ([str(two_ranks.run.path), "-m", "loss.topk=8,16"], "the run kept no scores"),
        (["loss=reverse"], "loss=reverse: give one RUN"),
        (["runs/none"], "no such folder"),
        (["runs/latest", "--step", "3"], "--step: distill replay has no such flag"),
        ([str(two_ranks.run.path)], "the run kept no scores; record them with rollout.save_scores=true"),
        (["runs/latest", "loss.topk=65"], "loss.topk=65: 16 tokens of the teacher were recorded; lower it"),
        (["runs/latest", "rollout.temperature=2"], "rollout.temperature=2.0: the rollouts were recorded with 1.0"),
        (["runs/latest", "rollout.temprature=2"], "did you mean rollout.temperature?"),
        (["runs/latest", "loss.topk=8,16"], "several values are a sweep: add -m"),
    ):
        assert message in "\n".join(refused(one_rank.folder, monkeypatch, capsys, "replay", *argv)), argv
