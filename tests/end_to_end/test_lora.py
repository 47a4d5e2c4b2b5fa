"""`distill model.student.lora.rank=...`: adapters through real engines, checkpoints, resume and export."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill_cli import cli
from distill_cli.models.model_files import ASSETS
from tests.end_to_end.conftest import SHORT, Finished, distill

LORA = ("model.student.lora.rank=4", "model.student.lora.targets=[q_proj,o_proj,down_proj]")
NO_EVAL = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")
BASE = ASSETS / "tiny_pair/student"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two ranks whose engines get the adapter as it is."""
    options = (*LORA, "model.student.lora.sync=adapter", "cluster.ranks_per_node=2", "checkpoint.period=1")
    return distill(tmp_path_factory.mktemp("lora"), *SHORT, *NO_EVAL, *options)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_sampler_has_the_adapter(two_ranks: Finished) -> None:
    assert two_ranks.status == 0, two_ranks.stderr
    steps = two_ranks.metrics[1:]
    assert all(row["rollout/engine_mismatch"] < 1e-5 for row in steps)
    assert all(row["train/grad_norm"] > 0 for row in steps)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.exhaustive
def test_exports_are_the_student(two_ranks: Finished, tmp_path: Path) -> None:
    run = str(two_ranks.run.path)
    assert cli.run(["export", run, str(tmp_path / "merged")]) == 0
    assert cli.run(["export", run, str(tmp_path / "adapter"), "--adapter"]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", two_ranks.run.student))
    base = load_file(BASE / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(value, base[name]) != name.endswith(("q_proj.weight", "o_proj.weight", "down_proj.weight"))
    ids = torch.arange(3, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5 * float(merged.abs().max()))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_goes_on_elsewhere_and_merged(two_ranks: Finished) -> None:
    before, student = two_ranks.metrics, load_file(two_ranks.run.student / "model.safetensors")
    changes = ("cluster.ranks_per_node=1", "model.student.lora.sync=merged")
    done = distill(two_ranks.folder, "resume", "runs/latest", "--step", "1", *changes)
    assert done.status == 0, done.stderr
    for ours, theirs in zip(done.metrics[2:], before[2:], strict=True):
        assert ours["rollout/engine_mismatch"] < 1e-5
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    for name, value in load_file(done.run.student / "model.safetensors").items():
        torch.testing.assert_close(value, student[name], rtol=1e-3, atol=1e-5)
    done = distill(two_ranks.folder, "resume", "runs/latest", "train.max_steps=9", "model.student.lora.rank=8")
    assert (done.status, "lora.rank=8: the run was made with 4" in done.stderr) == (2, True)
