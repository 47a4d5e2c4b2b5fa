"""Tiny models of many families: random weights, each with the traits that set its family apart.

Heads have 32 dimensions: vLLM's attention on CPUs takes no fewer, and latent attention 512 + 64 alone.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from distill_cli.models.model_files import ASSETS

PAIR = ASSETS / "tiny_pair" / "student"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
VOCAB = 512
DENSE = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
HEAD = {"head_dim": 32}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {
    **HEAD, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}


@dataclass(frozen=True)
class Family:
    """A family's tiny config."""

    config: dict[str, Any] = field(default_factory=dict)
    rows: bool = False
    """The state of some layer would cross documents: one row for each."""
    model_type: str | None = None
    """If it is not the family's name."""
    text: str | None = None
    """The family of the text model in a multimodal one; `config` has the towers."""
    small_queries: bool = False
    """Scores are not divided by the root of the head's size: the norm of queries learns to be small."""


FAMILIES: dict[str, Family] = {
    "apertus": Family(),
    "arcee": Family(),
    "cohere": Family({"logit_scale": 0.25}),
    # beyond the window vLLM sees one token more than transformers
    "cohere2": Family({"logit_scale": 0.25, "sliding_window": 128, "layer_types": SLIDING["layer_types"]}),
    "cwm": Family(HEAD),
    "ernie4_5": Family(HEAD),
    "exaone4": Family({**HEAD, **SLIDING}),
    "gemma": Family(HEAD),
    "gemma2": Family({**HEAD, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3_text": Family({**HEAD, **SLIDING, "query_pre_attn_scalar": 32}),
    "gemma4_text": Family(
        {**HEAD, "global_head_dim": 64, "hidden_size_per_layer_input": 0, "sliding_window": 16, "num_hidden_layers": 2,
         "layer_types": SLIDING["layer_types"], "vocab_size_per_layer_input": VOCAB}, small_queries=True
    ),
    "gemma4_shared": Family(
        {**HEAD, "global_head_dim": 64, "hidden_size_per_layer_input": 16, "sliding_window": 16, "num_hidden_layers": 4,
         "layer_types": SLIDING["layer_types"] * 2, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB},
        small_queries=True, model_type="gemma4_text",
    ),
    "gemma3n_text": Family(
        {**HEAD, "sliding_window": 16, "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2,
         "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
         "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2},
        small_queries=True,
    ),
    "glm": Family(HEAD),
    "glm4": Family(HEAD),
    "gpt_neox": Family(),
    "gpt2": Family({"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt_oss": Family({**HEAD, **LOCAL_EXPERTS, "sliding_window": 16}),
    "granite": Family(
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5}
    ),
    "helium": Family(HEAD),
    "hunyuan_v1_dense": Family(HEAD),
    "llama": Family(),
    "mistral": Family({"sliding_window": 16}),
    "ministral": Family({**HEAD, **SLIDING}),
    "ministral3": Family(HEAD),
    "mixtral": Family(LOCAL_EXPERTS),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family({"sliding_window": 16, "layer_types": SLIDING["layer_types"]}),
    "olmoe": Family(EXPERTS),
    "opt": Family({"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "phi": Family(),
    "phi3": Family({"sliding_window": 16}),
    "phimoe": Family({**LOCAL_EXPERTS, "router_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True}),
    "qwen2": Family(),
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}),
    "qwen3": Family(HEAD),
    "qwen3_moe": Family({**HEAD, **EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "seed_oss": Family(HEAD),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "stablelm": Family(),
    "starcoder2": Family({"sliding_window": 16}),
    "vaultgemma": Family({**HEAD, **SLIDING, "query_pre_attn_scalar": 32}),
    "deepseek_v2": Family(MLA),
    "deepseek_v3": Family(MLA),
    "dots1": Family({**HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                     "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "ernie4_5_moe": Family(
        {**HEAD, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
    ),
    "glm4_moe": Family({**HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "granitemoe": Family(LOCAL_EXPERTS),
    "granitemoeshared": Family({**LOCAL_EXPERTS, "shared_intermediate_size": 64}),
    "llama4_text": Family({**HEAD, **LOCAL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
                           "attention_chunk_size": 128, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 1},
                          rows=True),
    "bloom": Family({"n_layer": 2, "n_head": 4}, rows=True),
    "gptj": Family({"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 16}, rows=True),
    "falcon": Family(rows=True),
    "mamba": Family({"state_size": 8, "expand": 1, "time_step_rank": 8, "num_hidden_layers": 1}, rows=True),
    "bamba": Family({**MAMBA, "mamba_expand": 1, "attn_layer_indices": [1]}, rows=True),
    "falcon_h1": Family({**HEAD, **MAMBA, "mamba_expand": 1, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}, rows=True),
    "granitemoehybrid": Family(
        {**LOCAL_EXPERTS, **MAMBA, "mamba_expand": 1, "layer_types": ["mamba", "attention"], "logits_scaling": 4.0,
         "shared_intermediate_size": 64}, rows=True
    ),
    "lfm2": Family(
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_dim": 128}, rows=True
    ),
    "lfm2_moe": Family({**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, rows=True),
    "nemotron_h": Family(
        {**HEAD, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
         "layers_block_type": ["mamba", "attention", "mlp"]}, rows=True
    ),
    "qwen3_5_text": Family(DELTA_NET, rows=True),
    "qwen3_5_moe_text": Family({**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 32}, rows=True),
    "qwen3_next": Family({**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 32}, rows=True),
    "olmo_hybrid": Family({**DELTA_NET}, rows=True),
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES |= {
    "gemma3": Family(
        {"vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
         "mm_tokens_per_image": 4, "image_token_index": 510, "boi_token_index": 508, "eoi_token_index": 509},
        text="gemma3_text",
    ),
    "gemma4": Family(
        {"vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 16}, "audio_config": None,
         "image_token_id": 510, "boi_token_id": 508, "eoi_token_id": 509, "audio_token_id": 507},
        text="gemma4_text", small_queries=True,
    ),
    "qwen3_5": Family(
        {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                           "out_hidden_size": 128},
         "image_token_id": 510, "video_token_id": 509, "vision_start_token_id": 507, "vision_end_token_id": 508},
        text="qwen3_5_text", rows=True,
    ),
    "llama4": Family(
        {"vision_config": {**TOWER, "image_size": 28, "patch_size": 14, "vision_output_dim": 32,
                           "projector_input_dim": 32, "projector_output_dim": 32},
         "image_token_index": 510, "boi_token_index": 508, "eoi_token_index": 509},
        text="llama4_text", rows=True,
    ),
    "mistral3": Family(
        {"vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16, "image_size": 28, "patch_size": 14},
         "image_token_index": 510},
        text="mistral",
    ),
}  # fmt: skip


def make_config(name: str, **changes: Any) -> Any:
    """The family's tiny config; keys that it does not know are left out. Changes are the text model's."""
    family = FAMILIES[name]
    if family.text is not None:
        return CONFIG_MAPPING[name](text_config=make_config(family.text, **changes).to_dict(), **family.config)
    return CONFIG_MAPPING[family.model_type or name](**{**DENSE, **family.config, **changes})


def make_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights, far enough from its initialisation to tell tokens apart."""
    torch.manual_seed(seed)
    config = make_config(family, **changes)
    kind = AutoModelForCausalLM if FAMILIES[family].text is None else AutoModelForImageTextToText
    model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if FAMILIES[family].small_queries and name.endswith("q_norm.weight"):
                param.fill_(0.1)
            elif name.endswith("gate.weight") and not param.any():  # its experts would tie
                param.normal_(std=0.04)
            elif param.ndim >= 2 and not name.endswith("A_log"):
                param.mul_(2.0)
            else:  # norms and biases that differ, so that a wrong gradient of theirs shows
                param.add_(torch.randn(param.shape) * 0.1)
    return model.eval()


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model under its published names, with the embedded pair's tokenizer."""
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(PAIR / file, folder / file)
