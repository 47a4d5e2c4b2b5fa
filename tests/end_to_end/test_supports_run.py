"""Runs whose teacher returns hidden states, and replays of them: every new number is the naive implementation's."""

import json
from pathlib import Path

import pytest

from distill_cli.data.recorded_run import Recording
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_files import ASSETS, hidden_size
from distill_cli.types import HiddenSize
from tests.end_to_end.conftest import SHORT, Finished, distill
from tests.end_to_end.naive import check_numbers, check_run

pytestmark = pytest.mark.slow

UNMEASURED = ("eval.period=0", "eval.at_start=false", "eval.record_samples=0", "tracker=none")
SIGNALS = (
    "loss.token_clip=0.8",
    "loss.policy_gradient=0.3",
    "loss.reward=0.2",
    "loss.penalty=0.1",
    "loss.max_ratio=2",
    "loss.temperature=1",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with every term of the loss at once, which keeps hidden states."""
    settings = (*SHORT, *UNMEASURED, "train.max_steps=2", "rollout.save_scores=hidden", "eval.at_end=true")
    groups = ("rollout.prompts_per_step=4", "rollout.generations_per_prompt=2", "loss.topk=4", "eval.max_samples=4")
    loss = ("loss=jsd", "loss.support=union", "loss/token_weight=teachability", *SIGNALS)
    done = distill(tmp_path_factory.mktemp("recorded"), *settings, *groups, *loss)
    assert done.status == 0, done.stdout + done.stderr
    return done


def test_every_term_matches_the_naive_implementation(recorded: Finished) -> None:
    check_numbers(recorded, steps=2)
    first, last = recorded.metrics[1:]
    both = ("train/grad_norm_divergence", "train/grad_norm_advantage")
    assert all(first[name] > 0 for name in both)  # of the first step, and where the run validates
    assert all(last[name] > 0 for name in both)


@pytest.mark.exhaustive
def test_replays_have_any_support(recorded: Finished, tmp_path: Path) -> None:
    """On two tensor-parallel ranks, which share both heads; full is the teacher's top-k of the whole vocabulary."""
    only = ("loss.policy_gradient=0", "loss.reward=0", "loss.penalty=0", "loss.token_clip=null", "tracker=none")
    layout = ("cluster.ranks_per_node=2", "mesh.tensor=2", "eval.at_end=false")
    runs = {}
    for name, *loss in (
        ("teacher", "loss.support=teacher", "loss.topk=512", "loss/token_weight=position", "loss.half_life=3"),
        ("full", "loss.support=full", "loss/token_weight=position", "loss.half_life=3"),
        ("student", "loss.support=student", "loss=reverse", "loss.temperature=1.3", "loss.token_weight=null"),
    ):
        argv = (str(recorded.run.path), *only, *layout, *loss, f"run.name={name}")
        done = distill(tmp_path, "replay", *argv)
        assert done.status == 0, done.stdout + done.stderr
        runs[name] = RunDir(tmp_path / "runs" / name)
        check_run(runs[name], steps=2)
    teacher, full = (read_metrics(runs[name].metrics)[1:] for name in ("teacher", "full"))
    for ours, theirs in zip(full, teacher, strict=True):
        for metric in ("loss", "kl_forward", "kl_reverse", "grad_norm", "entropy", "weighted_loss"):
            assert ours[f"train/{metric}"] == pytest.approx(theirs[f"train/{metric}"], rel=1e-6, abs=1e-7), metric
    assert json.loads((recorded.run.scores / "recording.json").read_text())["hidden"] is True
    assert Recording.of(str(recorded.run.path)).hidden_states() == [
        HiddenSize(hidden_size(ASSETS / "tiny_pair/teacher"), 4)
    ]


@pytest.mark.exhaustive
def test_a_damaged_head_is_named(recorded: Finished, tmp_path: Path) -> None:
    (file,) = (recorded.run.scores / "heads").glob("*.safetensors")
    kept = file.read_bytes()
    file.write_bytes(kept[:100])
    try:
        done = distill(tmp_path, "replay", str(recorded.run.path), "loss.support=full", "eval.at_end=false")
    finally:
        file.write_bytes(kept)
    assert done.status != 0
    assert f"{file}: is cut" in done.stdout + done.stderr
