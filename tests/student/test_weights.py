"""Each rank reads its own slices, and what they make up is what transformers loads, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_cli.errors import ConfigError
from distill_cli.student import attention
from distill_cli.student.model import build_lm

from .train_rank import made_up_model

ROOT = Path(__file__).parents[2]


def test_parameters_equal_those_of_from_pretrained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.student.load_rank", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("wrong", ["model.norm.weight", "model.extra.weight"])
def test_missing_or_extra_tensor_is_named(wrong: str, tmp_path: Path) -> None:
    attention.register()
    made_up_model("qwen3", tied=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if state.pop(wrong, None) is None:
        state[wrong] = torch.ones(1)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=wrong):
        build_lm(tmp_path)
