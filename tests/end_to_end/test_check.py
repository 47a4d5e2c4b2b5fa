"""`distill check`, as typed: what it says of the embedded pair, and of a pair that cannot be."""

import json
import os
import shutil
from pathlib import Path

import pytest

from distill_cli.models.model_files import ASSETS
from tests.families import make_model, save_model

from .conftest import distill

pytestmark = pytest.mark.slow


def test_check_passes_on_two_ranks(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = distill(tmp_path, "check", "cluster.ranks_per_node=2", "mesh.context=2", TMPDIR=str(temporary))
    assert done.status == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == 14
    assert not any(line.startswith("bad") for line in lines)
    assert lines[-1].startswith("everything is right")
    assert not list(temporary.glob("distill-check-*"))  # nothing is left
    assert os.listdir(tmp_path) == ["tmp"]


@pytest.mark.exhaustive
def test_check_of_a_student_with_state(tmp_path: Path) -> None:
    """Its sequences are not packed, although train.packing is true."""
    for seed, role in enumerate(("student", "teacher")):
        save_model(make_model("qwen3_5_text", seed=seed), tmp_path / role)
    models = [f"model.{role}.path={tmp_path / role}" for role in ("student", "teacher")]
    exact = [f"model.{role}.dtype=float32" for role in ("student", "teacher")]
    done = distill(tmp_path, "check", *models, *exact)
    assert done.status == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("everything is right")


def test_a_tokenizer_with_two_ids_swapped(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(ASSETS / "tiny_pair/teacher", teacher)
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    done = distill(tmp_path, "check", f"model.teacher.path={teacher}")
    assert done.status == 2
    assert "2 tokens have different ids" in done.stderr
