"""Each rank reads its own slices, and what they make up is what transformers loads, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_cli.engines.weight_sync import full_tensors
from distill_cli.errors import ConfigError
from distill_cli.student import attention
from distill_cli.student.model import build_lm
from distill_cli.student.weights import load_weights

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


@pytest.mark.parametrize("stored", [("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight",)])
def test_tied_head_has_every_name_of_the_files(stored: tuple[str, ...], tmp_path: Path) -> None:
    model = made_up_model("qwen3", tied=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    tied = state.pop("model.embed_tokens.weight")
    save_file({**state, **{name: tied.clone() for name in stored}}, tmp_path / "model.safetensors")
    lm, published = build_lm(tmp_path)
    load_weights(lm, published, device=torch.device("cpu"))
    assert lm.lm_head.weight is lm.get_input_embeddings().weight
    sent = dict(full_tensors(published.weights(lm.named_parameters()), dtype=None))
    written = published.stored(lambda group: {name: lm.get_parameter(name).detach() for name in group.params})
    assert sent.keys() == set(written.shapes) == {*state, *stored}
    for name in stored:
        assert sent[name].equal(tied)
        assert written.read([name])[name].equal(tied)


def test_two_values_of_a_tied_head(tmp_path: Path) -> None:
    model = made_up_model("qwen3", tied=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ConfigError, match=r"ties model\.embed_tokens\.weight to lm_head\.weight, .* have two values"):
        build_lm(tmp_path)
