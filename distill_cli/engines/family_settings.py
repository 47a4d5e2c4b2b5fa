"""What vLLM needs to be given for some model families: what it reads in a config.json that transformers left out.

Importing this module imports neither vLLM nor torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAME_AS: dict[str, dict[str, str]] = {
    "lfm2": {"conv_dim": "hidden_size", "block_dim": "hidden_size"},
}
"""By `model_type`: a field that vLLM reads, and the one that has the same value."""

CONSTANTS: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
}
"""By `model_type`: a field that vLLM reads, and its value in every model of the family."""

READ_BY_VLLM_ALONE: dict[str, dict[str, str]] = {
    "gpt_neox": {"num_key_value_heads": "num_attention_heads"},
}
"""By `model_type`: a field that transformers' model does not have, and the one that says what it does instead."""

ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""vLLM's names of architectures that transformers spells otherwise."""


def supplied_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that vLLM reads and a config.json lacks, for `hf_overrides`."""
    family, architectures = config.get("model_type", ""), config.get("architectures") or []
    same = {name: config[other] for name, other in SAME_AS.get(family, {}).items() if other in config}
    fields = {name: value for name, value in (same | CONSTANTS.get(family, {})).items() if name not in config}
    fields |= {name: config[other] for name, other in READ_BY_VLLM_ALONE.get(family, {}).items() if other in config}
    if any(name in ARCHITECTURES for name in architectures):
        fields["architectures"] = [ARCHITECTURES.get(name, name) for name in architectures]
    return fields


def format_arguments(folder: str) -> dict[str, str]:
    """Return arguments of `vllm.LLM` for a folder that holds a model twice, in Mistral's own format too.

    vLLM would read that one, whose names are others than those of config.json's model.
    """
    names = ("config_format", "load_format", "tokenizer_mode")
    return dict.fromkeys(names, "hf") if any(Path(folder).glob("consolidated*.safetensors")) else {}


def read_config(folder: str) -> dict[str, Any]:
    """Return a model folder's config.json, {} without one."""
    file = Path(folder) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}
