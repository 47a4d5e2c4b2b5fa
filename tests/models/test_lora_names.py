"""The layers that get adapters: every linear layer of a family's decoder, and nothing else."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distill_cli.errors import ConfigError
from distill_cli.models.lora_names import targeted
from distill_cli.models.tensor_names import is_router, text_tensors
from distill_cli.student.decoder import drop_other_modules
from tests.families import FAMILIES, make_config

QWEN3_VL_MOE = {
    "model.visual.blocks.0.attn.qkv.weight": (8, 4),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4),
    "multi_modal_projector.linear_1.weight": (4, 4),
    "audio_tower.layers.0.fc1.weight": (4, 4),
    "mtp.layers.0.mlp.up_proj.weight": (4, 4),
    "model.language_model.layers.61.eh_proj.weight": (4, 8),
    "model.language_model.layers.61.self_attn.q_proj.weight": (4, 4),
    "model.language_model.layers.6.self_attn.q_proj.weight": (4, 4),
    "model.language_model.layers.6.self_attn.q_norm.weight": (2, 2),
    "model.language_model.layers.6.mlp.gate.weight": (2, 4),
    "model.language_model.layers.6.mlp.experts.0.up_proj.weight": (4, 4),
    "model.language_model.layers.6.mlp.experts.gate_up_proj": (2, 8, 4),
    "model.language_model.layers.6.mlp.shared_experts.up_proj.weight": (4, 4),
    "model.language_model.embed_tokens.weight": (9, 4),
}


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"bloom", "falcon", "gpt2", "gptj"}))  # no `layers`
def test_all_linear_layers_but_routers(name: str) -> None:
    kind = AutoModelForCausalLM if FAMILIES[name].text is None else AutoModelForImageTextToText
    with torch.device("meta"):
        lm = kind.from_config(make_config(name))
    shapes = {name: tuple(param.shape) for name, param in lm.named_parameters()}
    drop_other_modules(lm)
    kept = {name for name, _ in lm.named_parameters()}
    linear = {name for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linear if re.search(r"layers\.\d+\.", name) and not is_router(f"{name}.")}
    read = re.compile(r"(out|x|dt)_proj$")  # by kernels, in Mamba mixers
    mamba = {name for name in inside if read.search(name) and read.sub("D", name) in shapes}
    assert targeted(shapes, None).keys() == inside - mamba
    assert text_tensors(shapes).keys() == kept


def test_other_parts_get_no_adapters() -> None:
    layer = "model.language_model.layers.6"
    found = targeted(QWEN3_VL_MOE, None)
    assert list(found) == [f"{layer}.self_attn.q_proj", f"{layer}.mlp.shared_experts.up_proj"]
    assert list(targeted(QWEN3_VL_MOE, ["up_proj"])) == [f"{layer}.mlp.shared_experts.up_proj"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("experts.gate_up_proj", "matches experts, which are stacked in one tensor"),
        ("experts.0.up_proj", "matches experts"),
        ("mlp.gate", "matches routers"),
        ("qkv", "matches no linear layer"),
    ],
)
def test_what_cannot_be_adapted(target: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"targets={target}: {why}.*choose from self_attn.q_proj"):
        targeted(QWEN3_VL_MOE, [target])
