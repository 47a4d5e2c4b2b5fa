"""`distill check`, as typed: what it says of the embedded pair, and of a pair that cannot be."""

import json
import os
import shutil
from pathlib import Path

import pytest

from distill_cli.models.model_files import ASSETS

from .conftest import distill

pytestmark = pytest.mark.slow


def test_check_passes_on_two_ranks(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = distill(tmp_path, "check", "cluster.ranks_per_node=2", "mesh.context=2", TMPDIR=str(temporary))
    assert done.status == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == 10
    assert not any(line.startswith("bad") for line in lines)
    assert lines[-1].startswith("everything is right")
    assert not list(temporary.glob("distill-check-*"))  # nothing is left
    assert os.listdir(tmp_path) == ["tmp"]


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
