"""What config.json says of layers, by each of the ways in which families say it."""

from typing import Any

import pytest

from distill_cli.models.known_families import causal_families, families, head_classes
from distill_cli.models.traits import Experts, Traits
from tests.families import FAMILIES, make_config

MAMBA = {"mamba_d_state": 16, "num_hidden_layers": 4}
EXPERTS = {
    **dict.fromkeys(("gpt_oss", "mixtral", "olmoe", "phimoe", "qwen3_moe", "granitemoe", "lfm2_moe"), Experts(4, 2, 0)),
    **dict.fromkeys(("qwen2_moe", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe"), Experts(4, 2, 1)),
    **dict.fromkeys(("granitemoeshared", "granitemoehybrid", "qwen3_5_moe_text", "qwen3_next"), Experts(4, 2, 1)),
    "ernie4_5_moe": Experts(4, 2, 2),
    **dict.fromkeys(("llama4", "llama4_text"), Experts(4, 1, 0)),
}
STATEFUL: dict[str, tuple[dict[str, Any], list[int]]] = {
    "LFM2": ({"full_attn_idxs": [1, 3], "num_hidden_layers": 4}, [0, 2]),
    "Bamba": ({**MAMBA, "attn_layer_indices": [2]}, [0, 1, 3]),
    "Bamba without attention": ({**MAMBA, "attn_layer_indices": None}, [0, 1, 2, 3]),
    "Jamba": ({**MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}, [0, 2]),
    "Mamba": ({"state_size": 16, "num_hidden_layers": 2}, [0, 1]),
    "Nemotron-H": ({"hybrid_override_pattern": "M-*E"}, [0]),
    "Qwen3-Next": ({"linear_num_key_heads": 2, "num_hidden_layers": 5}, [0, 1, 2, 4]),
    "Kimi Linear": ({"linear_attn_config": {"full_attn_layers": [2]}, "num_hidden_layers": 2}, [0]),
    "MiniMax": ({"attn_type_list": [0, 1]}, [0]),
    "RecurrentGemma": ({"_block_types": ["recurrent", "attention"], "num_hidden_layers": 3}, [0, 2]),
    "RWKV": ({"model_type": "rwkv", "num_hidden_layers": 1}, [0]),
    "a new kind": ({"layer_types": ["full_attention", "holographic"]}, [1]),
    "in a text model": ({"text_config": {"layer_types": ["conv", "full_attention"]}}, [0]),
    "Granite without Mamba": ({**MAMBA, "layer_types": ["attention"] * 4}, []),
    "Gemma": ({"layer_types": ["sliding_attention", "full_attention"]}, []),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_layers_and_experts(name: str) -> None:
    traits = Traits.of(make_config(name).to_diff_dict())
    assert bool(traits.needs_rows) == FAMILIES[name].rows
    assert traits.experts == EXPERTS.get(name)
    assert traits.is_multimodal == (FAMILIES[name].text is not None)


@pytest.mark.parametrize("name", STATEFUL)
def test_layers_that_carry_state(name: str) -> None:
    config, expected = STATEFUL[name]
    traits = Traits.of(config)
    assert [layer for layer, kind in enumerate(traits.kinds) if kind in traits.stateful_kinds] == expected


@pytest.mark.parametrize("off", [{"num_local_experts": 0}, {"num_experts": 1}, {"num_experts": 8, "is_moe": False}])
def test_experts_that_are_not_there(off: dict[str, Any]) -> None:
    assert Traits.of(off).experts is None


def test_other_traits() -> None:
    text = {"sliding_window": 1024, "final_logit_softcapping": 30.0, "num_hidden_layers": 3}
    traits = Traits.of({"model_type": "gemma3", "text_config": text, "quantization_config": {"quant_method": "fp8"}})
    assert traits.is_multimodal
    assert (traits.family, traits.num_layers, traits.window, traits.soft_cap) == ("gemma3", 3, 1024, 30.0)
    assert (traits.quantization, traits.is_encoder_decoder) == ("fp8", False)
    assert Traits.of({"sliding_window": 8, "use_sliding_window": False, "quantization_config": None}).window is None


def test_families_of_the_installed_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_families() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {"Qwen3ForCausalLM", "GPT2LMHeadModel", "Mistral3ForConditionalGeneration"} < head_classes()
    assert causal_families() < families()
    assert {"t5", "mistral3"} < families() - causal_families()
