"""What is read from a layer's tensors, by hand."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distill_cli.memory.layers import LayerShape, read_layer
from distill_cli.memory.shape import shape_of
from distill_cli.models.traits import Experts, Traits
from tests.families import FAMILIES, make_config

H = 8
ROPE = {"rope_theta": 1e4}
ATTENTION = {"self_attn.q_proj.weight": (8, H), "self_attn.k_proj.weight": (4, H), "self_attn.v_proj.weight": (4, H)}
ATTENTION |= {
    "self_attn.o_proj.weight": (H, 8),
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
}
MLP = {"mlp.gate_proj.weight": (12, H), "mlp.up_proj.weight": (12, H), "mlp.down_proj.weight": (H, 12)}
CASES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], dict[str, Any]]] = {
    "Llama": ({**ATTENTION, **MLP}, ROPE, {"query": 8, "key": 4, "mlp": 12, "mlp_kept": 48, "norms": 2, "other": 0}),
    "Phi-3": (
        {"self_attn.qkv_proj.weight": (16, H), "self_attn.o_proj.weight": (H, 8),
         "mlp.gate_up_proj.weight": (24, H), "mlp.down_proj.weight": (H, 12)}, ROPE,
        {"query": 8, "key": 4, "other": 12, "mlp": 12, "mlp_kept": 48, "mlp_matrix": 24 * H, "has_plain_norms": True},
    ),
    "GPT-2": (
        {"attn.c_attn.weight": (H, 24), "attn.c_proj.weight": (H, H), "mlp.c_fc.weight": (H, 32), "attn.bias": (1, 1),
         "mlp.c_proj.weight": (32, H), "ln_1.weight": (H,), "ln_1.bias": (H,), "ln_2.weight": (H,), "ln_2.bias": (H,)},
        {"activation_function": "gelu_new"},
        {"query": 8, "key": 8, "other": -8, "mlp": 32, "mlp_kept": 32 * 6, "norms": 2, "has_plain_norms": True},
    ),
    "MLA": (
        {"self_attn.q_a_proj.weight": (3, H), "self_attn.q_b_proj.weight": (10, 3), "self_attn.o_proj.weight": (H, 6),
         "self_attn.kv_a_proj_with_mqa.weight": (5, H), "self_attn.kv_b_proj.weight": (14, 4), **MLP}, ROPE,
        {"query": 6, "key": 10, "other": 14 + 2 * 8},
    ),
    "gated attention": ({**ATTENTION, **MLP, "self_attn.q_proj.weight": (16, H)}, ROPE, {"query": 8, "other": 24}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_widths_of_a_layer(name: str) -> None:
    tensors, config, expected = CASES[name]
    layer = read_layer(tensors, config, None, H)
    assert {key: getattr(layer, key) for key in expected} == expected
    assert layer.params == sum(map(math.prod, tensors.values()))


def test_experts_stacked_and_one_by_one() -> None:
    router = {"mlp.gate.weight": (4, H)}
    stacked = {"mlp.experts.gate_up_proj": (4, 6, H), "mlp.experts.down_proj": (4, H, 3)}
    each = {
        f"mlp.experts.{number}.{name}.weight": shape
        for number in range(4)
        for name, shape in (("w1", (3, H)), ("w3", (3, H)), ("w2", (H, 3)))
    }
    layers = [read_layer({**ATTENTION, **router, **one}, ROPE, Experts(4, 2, 0), H) for one in (stacked, each)]
    assert layers[0] == layers[1]
    assert layers[0].routed_params == 4 * 9 * H
    assert layers[0].mlp_matrix == 4 * 6 * H
    assert layers[0].routed == 2 * (2 * H + 4 * 3)
    assert layers[0].params_of(2) == layers[0].params - 2 * 9 * H
    assert layers[0].mlp == 0


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"mamba"}))  # its first version: no prediction
def test_every_family_has_a_shape(name: str) -> None:
    kind = AutoModelForCausalLM if FAMILIES[name].text is None else AutoModelForImageTextToText
    config = make_config(name)
    with torch.device("meta"):
        lm = kind.from_config(config)
    shape = shape_of(config.to_dict(), {name: tuple(param.shape) for name, param in lm.named_parameters()})
    assert len(shape.layers) == Traits.of(config.to_dict()).num_layers
    assert all(layer.query or layer.state or layer.mlp for layer in shape.layers)
    assert shape.hidden == 128
    assert isinstance(shape.layers[0], LayerShape)
