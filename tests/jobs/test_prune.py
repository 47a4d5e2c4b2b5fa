"""Pruning by layers: which stay, what the config says of each, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.errors import ConfigError
from distill_cli.jobs.prune import _texts, prune
from distill_cli.models.model_files import ASSETS
from tests.families import make_model, save_model

TEACHER = ASSETS / "tiny_pair" / "teacher"


def test_the_block_that_matters_least_goes(tmp_path: Path) -> None:
    found = prune(str(TEACHER), tmp_path / "student", num_layers=3)
    whole, pruned = (AutoModelForCausalLM.from_pretrained(at) for at in (TEACHER, tmp_path / "student"))
    assert found.num_layers == 4
    losses = {}
    for gone in (1, 2):
        smaller = AutoModelForCausalLM.from_pretrained(TEACHER)
        smaller.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(smaller.model.layers) if i != gone)
        ids = _texts(AutoTokenizer.from_pretrained(TEACHER))
        with torch.no_grad():
            logp, logq = (lm(ids, use_cache=False).logits.log_softmax(-1) for lm in (whole, smaller))
        losses[gone] = (logp.exp() * (logp - logq)).sum(-1).mean().item()
    least = min(losses, key=lambda gone: losses[gone])
    assert found.kept == [index for index in range(4) if index != least]
    assert found.kl == pytest.approx(losses[least], rel=1e-4)
    assert pruned.config.num_hidden_layers == 3
    for place, index in enumerate(found.kept):
        for name, value in pruned.model.layers[place].state_dict().items():
            assert torch.equal(value, whole.model.layers[index].state_dict()[name]), name
    assert torch.equal(pruned.lm_head.weight, whole.lm_head.weight)
    files = {file.name for file in (tmp_path / "student").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors"} <= files


def test_each_layer_keeps_its_type(tmp_path: Path) -> None:
    sliding = {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
    }
    save_model(make_model("gemma3_text", **sliding), tmp_path / "source")
    prune(str(tmp_path / "source"), tmp_path / "student", num_layers=2)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("model", "num_layers", "message"),
    [
        (str(TEACHER), 5, "--layers 5: .* has 4; give fewer"),
        (str(TEACHER), 1, "--layers 1: must be at least 2"),
        (str(TEACHER), None, "--layers: a value is needed"),
        ("nothing.gguf", None, "nothing.gguf: no such file"),
        (__file__, 2, "MODEL="),
    ],
)
def test_wrong_arguments_are_refused(model: str, num_layers: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(model, tmp_path / "student", num_layers=num_layers)
    assert not (tmp_path / "student").exists()


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"not a zip file")
    with pytest.raises(ConfigError, match="not a wheel"):
        prune(str(tmp_path / "a.whl"), tmp_path / "student", num_layers=None)


def test_an_existing_folder_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        prune(str(TEACHER), tmp_path, num_layers=2)
