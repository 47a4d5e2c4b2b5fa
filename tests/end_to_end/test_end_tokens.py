"""A Base-like student and an instruct-like teacher, which end with different tokens (`model.eos_map`)."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from distill_cli.models.model_files import ASSETS
from tests.end_to_end.conftest import distill
from tests.end_to_end.naive import check_numbers

END_OF_TEXT, TURN_END = 0, 2


def make_base_like(folder: Path) -> Path:
    """The tiny student, that ends with <|endoftext|> where it ended with <|im_end|>: their embeddings change places."""
    shutil.copytree(ASSETS / "tiny_pair/student", folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[[END_OF_TEXT, TURN_END]] = embedding[[TURN_END, END_OF_TEXT]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": END_OF_TEXT}))
    return folder


@pytest.mark.slow
@pytest.mark.exhaustive
def test_different_end_tokens_end_answers(tmp_path: Path) -> None:
    student = make_base_like(tmp_path / "base")
    argv = (f"model.student.path={student}", "train.max_steps=12", "rollout.prompts_per_step=32", "tracker=none")
    argv += ("loss.topk=4", "loss.temperature=1.5", "train.eps=1e-5", "rollout.save_scores=true")
    argv += ("train.global_batch_size=32", "eval.period=0", "eval.max_samples=64", "eval.teacher=false")
    done = distill(tmp_path, *argv)
    assert done.status == 0, done.stderr
    assert "ends with tokens [0] and the teacher with [2]; model.eos_map=auto" in done.stdout
    check_numbers(done, steps=2)
    rows = done.metrics
    assert max(row["rollout/mean_length"] for row in rows[1:]) < 40
    assert max(row["rollout/truncated_rate"] for row in rows[1:]) < 0.1
    assert rows[-1]["rollout/truncated_rate"] <= 0.04
    assert max(row["rollout/engine_mismatch"] for row in rows[1:]) < 1e-4
    assert rows[-1]["train/kl_reverse"] < rows[1]["train/kl_reverse"]
    generation = json.loads((done.run.student / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {END_OF_TEXT, TURN_END}
