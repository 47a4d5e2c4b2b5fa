"""Published models as folders without weights: config.json, and safetensors files that are headers and holes.

Each entry of MODELS has the fields of the model's config.json that decide its shapes; transformers' defaults have the
rest. Sources: "config" is config.json on the hub (or a copy of it in a model derived from it), "card" the model card,
"gguf" the header of a converted file on ollama.com. Parameters are those that the hub counts in the safetensors files
(`hub`), or the card's number.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Type, in safetensors' notation, and shape of each tensor."""
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
BYTES = {"BF16": 2, "F32": 4, "I64": 8, "U8": 1}


@dataclass(frozen=True)
class Model:
    family: str
    """`model_type` of config.json."""
    parameters: float
    """Parameters of all tensors, towers included."""
    config: dict[str, Any] = field(default_factory=dict)
    next_tokens: bool = False
    """The files have a layer that predicts a second token, which transformers leaves out."""
    mxfp4: bool = False
    """The experts' matrices are stored in MXFP4."""


def attention_at(*layers: int, of: int, other: str, attention: str = "full_attention") -> list[str]:
    return [attention if layer in layers else other for layer in range(of)]


def qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool = True) -> dict[str, Any]:
    return {
        "vocab_size": 151_936, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
    }  # fmt: skip


def qwen3_5(hidden: int, mlp: int, layers: int, heads: int, values: int, *, tied: bool, vision: Any) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_5_text", "vocab_size": 248_320, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": values, "tie_word_embeddings": tied,
        "max_position_embeddings": 262_144,
    }  # fmt: skip
    depth, width, inner = vision
    tower = {"depth": depth, "hidden_size": width, "intermediate_size": inner, "out_hidden_size": hidden}
    return {"text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


def ministral3(hidden: int, mlp: int, layers: int, *, tied: bool) -> dict[str, Any]:
    text = {
        "model_type": "ministral3", "vocab_size": 131_072, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    tower = {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14,
    }  # fmt: skip
    return {"text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


def granite4(
    hidden: int, mlp: int, attention: tuple[int, ...], *, heads: Any, mamba: Any, of: int, **experts: int
) -> Any:
    (heads, key_heads), (mamba_heads, mamba_size) = heads, mamba
    return {
        "vocab_size": 100_352, "hidden_size": hidden, "intermediate_size": mlp, "shared_intermediate_size": mlp,
        "num_hidden_layers": of, "layer_types": attention_at(*attention, of=of, other="mamba", attention="attention"),
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "mamba_n_heads": mamba_heads,
        "mamba_d_head": mamba_size, "mamba_d_state": 128, "mamba_n_groups": 1, "num_local_experts": 0,
        "num_experts_per_tok": 0, "tie_word_embeddings": True, "max_position_embeddings": 131_072, **experts,
    }  # fmt: skip


def lfm2(hidden: int, mlp: int, heads: int, attention: tuple[int, ...], *, of: int, **experts: int) -> dict[str, Any]:
    """`mlp` is the width in the files, to which config.json's larger number is adjusted."""
    return {
        "vocab_size": 65_536, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": of,
        "num_attention_heads": heads, "num_key_value_heads": 8, "block_auto_adjust_ff_dim": False,
        "layer_types": attention_at(*attention, of=of, other="conv"), **experts,
    }  # fmt: skip


def phi3(hidden: int, mlp: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 32_064, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "sliding_window": 2047,
        "max_position_embeddings": 4096, "pad_token_id": 32_000, "eos_token_id": 32_000, "tie_word_embeddings": False,
    }  # fmt: skip


def llama(
    vocab: int, hidden: int, mlp: int, layers: int, heads: int, key_heads: int, *, positions: int, tied: bool = True
) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": hidden // heads,
        "tie_word_embeddings": tied, "max_position_embeddings": positions,
    }  # fmt: skip


MODELS = {
    # config; card: 0.6B, 1.7B, 4.0B, 8.2B and 30.5B
    "Qwen/Qwen3-0.6B-Base": Model("qwen3", 0.6e9, qwen3(1024, 3072, 28, 16)),
    "Qwen/Qwen3-1.7B-Base": Model("qwen3", 1.7e9, qwen3(2048, 6144, 28, 16)),
    "Qwen/Qwen3-1.7B": Model("qwen3", 1.7e9, qwen3(2048, 6144, 28, 16)),
    "Qwen/Qwen3-4B-Base": Model("qwen3", 4.0e9, qwen3(2560, 9728, 36, 32)),
    "Qwen/Qwen3-4B": Model("qwen3", 4.0e9, qwen3(2560, 9728, 36, 32)),
    "Qwen/Qwen3-8B": Model("qwen3", 8.2e9, qwen3(4096, 12_288, 36, 32, tied=False)),
    "Qwen/Qwen3-30B-A3B": Model(
        "qwen3_moe", 30.5e9,
        {**qwen3(2048, 6144, 48, 32, tied=False), "num_key_value_heads": 4, "moe_intermediate_size": 768,
         "num_experts": 128, "num_experts_per_tok": 8},
    ),
    # config; card: 0.49B and 7.61B. The larger embedding has 128 more rows of padding
    "Qwen/Qwen2.5-0.5B-Instruct": Model(
        "qwen2", 0.494e9, llama(151_936, 896, 4864, 24, 14, 2, positions=32_768)
    ),
    "Qwen/Qwen2.5-7B-Instruct": Model(
        "qwen2", 7.61e9, llama(152_064, 3584, 18_944, 28, 28, 4, positions=32_768, tied=False)
    ),
    # card, gguf; hub: text, vision tower and the layer for a second token
    "Qwen/Qwen3.5-2B": Model(
        "qwen3_5", 2_274_069_824, qwen3_5(2048, 6144, 24, 8, 16, tied=True, vision=(24, 1024, 4096)), next_tokens=True
    ),
    "Qwen/Qwen3.5-9B": Model(
        "qwen3_5", 9_653_104_368, qwen3_5(4096, 12_288, 32, 16, 32, tied=False, vision=(27, 1152, 4304)),
        next_tokens=True,
    ),
    # config; card: 1.23B and 8.03B
    "meta-llama/Llama-3.2-1B-Instruct": Model(
        "llama", 1.23e9, llama(128_256, 2048, 8192, 16, 32, 8, positions=131_072)
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Model(
        "llama", 8.03e9, llama(128_256, 4096, 14_336, 32, 32, 8, positions=131_072, tied=False)
    ),
    # config; hub. The larger embedding has 64 more rows, for images
    "google/gemma-3-1b-it": Model(
        "gemma3_text", 999_885_952,
        {"vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
         "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32_768},
    ),
    "google/gemma-3-12b-it": Model(
        "gemma3", 12_187_325_040,
        {"text_config": {"vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360,
                         "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
         "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                           "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
                           "vision_use_head": False}},
    ),
    # config; hub, and the card's 31B
    "google/gemma-4-E2B-it": Model(
        "gemma4", 5_104_297_504,
        {"text_config": {"vocab_size": 262_144, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
                         "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
                         "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
                         "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
                         "final_logit_softcapping": 30.0},
         "vision_config": {}, "audio_config": {}},
    ),
    "google/gemma-4-31B-it": Model(
        "gemma4", 31e9,
        {"text_config": {"vocab_size": 262_144, "hidden_size": 5376, "intermediate_size": 21_504,
                         "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256,
                         "global_head_dim": 512, "num_global_key_value_heads": 4, "attention_k_eq_v": True,
                         "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 1024,
                         "final_logit_softcapping": 30.0},
         "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "head_dim": 72,
                           "num_attention_heads": 16, "num_key_value_heads": 16, "standardize": True},
         "audio_config": None},
    ),
    # config, which is transformers' default; hub
    "HuggingFaceTB/SmolLM3-3B-Base": Model("smollm3", 3_075_098_624),
    "HuggingFaceTB/SmolLM3-3B": Model("smollm3", 3_075_098_624),
    # config; hub
    "HuggingFaceTB/SmolLM2-135M-Instruct": Model(
        "llama", 134_515_008, llama(49_152, 576, 1536, 30, 9, 3, positions=8192)
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Model(
        "llama", 1_711_376_384, llama(49_152, 2048, 8192, 24, 32, 32, positions=8192)
    ),
    # card, gguf; hub
    "allenai/Olmo-3-7B-Instruct-SFT": Model(
        "olmo3", 7_298_011_136, {"vocab_size": 100_278, "num_key_value_heads": 32, "max_position_embeddings": 65_536}
    ),
    "allenai/Olmo-3.1-32B-Instruct": Model(
        "olmo3", 32_233_522_176,
        {"vocab_size": 100_278, "hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64,
         "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 65_536},
    ),
    # Liu et al. 2026 (arXiv 2601.08584), table 1; card: 3.4B and 13.5B, with a vision tower of 0.4B
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": Model("mistral3", 3.8e9, ministral3(3072, 9216, 26, tied=True)),
    "mistralai/Ministral-3-14B-Instruct-2512-BF16": Model(
        "mistral3", 13.9e9, ministral3(5120, 16_384, 40, tied=False)
    ),
    # config, gguf; hub
    "ibm-granite/granite-4.0-h-350m": Model(
        "granitemoehybrid", 340_332_224, granite4(768, 2048, (10, 13, 17, 27), heads=(12, 4), mamba=(48, 32), of=32)
    ),
    "ibm-granite/granite-4.0-h-micro": Model(
        "granitemoehybrid", 3_191_396_096, granite4(2048, 8192, (5, 15, 25, 35), heads=(32, 8), mamba=(64, 64), of=40)
    ),
    "ibm-granite/granite-4.0-h-tiny": Model(
        "granitemoehybrid", 6_939_037_248,
        granite4(1536, 1024, (5, 15, 25, 35), heads=(12, 4), mamba=(48, 64), of=40, intermediate_size=512,
                 num_local_experts=64, num_experts_per_tok=6),
    ),
    "ibm-granite/granite-4.0-h-small": Model(
        "granitemoehybrid", 32e9,
        granite4(4096, 1536, (5, 15, 25, 35), heads=(32, 8), mamba=(128, 64), of=40, intermediate_size=768,
                 num_local_experts=72, num_experts_per_tok=10),
    ),
    # config, gguf; card: 354,483,968, 1,170,340,608, 2.6B and 8.3B
    "LiquidAI/LFM2-350M": Model("lfm2", 354_483_968, lfm2(1024, 4608, 16, (2, 5, 8, 10, 12, 14), of=16)),
    "LiquidAI/LFM2-1.2B": Model("lfm2", 1_170_340_608, lfm2(2048, 8192, 32, (2, 5, 8, 10, 12, 14), of=16)),
    "LiquidAI/LFM2-2.6B": Model("lfm2", 2.6e9, lfm2(2048, 10_752, 32, (2, 5, 9, 13, 17, 21, 24, 27), of=30)),
    "LiquidAI/LFM2-8B-A1B": Model(
        "lfm2_moe", 8.3e9,
        lfm2(2048, 7168, 32, (2, 6, 10, 14, 18, 21), of=24, moe_intermediate_size=1792, num_dense_layers=2,
             num_experts=32, num_experts_per_tok=4),
    ),
    # config; card: 21B and 117B. The first is stored in bfloat16 by others, the second in MXFP4 by OpenAI
    "unsloth/gpt-oss-20b-BF16": Model("gpt_oss", 21e9, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "openai/gpt-oss-120b": Model("gpt_oss", 117e9, mxfp4=True),
    # config; card: 3.8B and 14B
    "microsoft/Phi-3-mini-4k-instruct": Model("phi3", 3.8e9, phi3(3072, 8192, 32, 32, 32)),
    "microsoft/Phi-3-medium-4k-instruct": Model("phi3", 14e9, phi3(5120, 17_920, 40, 40, 10)),
}  # fmt: skip


def write_folder(name: str, folder: Path) -> Path:
    """Write a published model's config.json and the header of its weights; the file's data is a hole."""
    config, header = describe(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries, end = dict[str, Any](), 0
    for tensor, (dtype, shape) in header.items():
        begin, end = end, end + BYTES[dtype] * math.prod(shape)
        entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return folder


@cache
def describe(name: str) -> tuple[dict[str, Any], Header]:
    """Return the content of config.json, and the type and shape of each tensor under its published name."""
    model = MODELS[name]
    config = CONFIG_MAPPING[model.family](**model.config)
    lm = build(config)
    content = {**config.to_dict(), "architectures": [type(lm).__name__]}
    header: Header = {
        tensor: (DTYPES[value.dtype], tuple(value.shape))
        for tensor, value in revert_weight_conversion(lm, stored(lm)).items()
    }
    if model.next_tokens:
        header |= next_token_layer(header, config.get_text_config().hidden_size)
    if model.mxfp4:
        content["quantization_config"] = {"quant_method": "mxfp4"}
        header = dict(part for tensor, entry in header.items() for part in mxfp4_parts(tensor, *entry))
    return content, header


def build(config: PretrainedConfig) -> Any:
    """Build a model on the meta device, where parameters have shapes and no memory."""
    auto: Any = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16)


def stored(lm: Any) -> dict[str, torch.Tensor]:
    """Return parameters, tied ones once, and persistent buffers."""
    tied = lm.all_tied_weights_keys if lm.config.get_text_config().tie_word_embeddings else {}
    return {name: value for name, value in lm.state_dict().items() if name not in tied}


def next_token_layer(header: Header, hidden: int) -> Header:
    """Return the tensors of Qwen3.5's layer for a second token: one of full attention, its inputs' norms and matrix."""
    copied = "model.language_model.layers.3."
    layer = {f"mtp.layers.0.{name.removeprefix(copied)}": entry for name, entry in header.items() if copied in name}
    norms = {
        f"mtp.{name}.weight": ("BF16", (hidden,)) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    return {**layer, **norms, "mtp.fc.weight": ("BF16", (hidden, 2 * hidden))}


def mxfp4_parts(name: str, dtype: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Return a tensor as the files of gpt-oss have it: 32 numbers of an expert's matrix are 16 bytes and a scale."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, (dtype, shape))]
    experts, columns, rows = shape
    groups = (experts, rows, columns // 32)
    return [(f"{name}_blocks", ("U8", (*groups, 16))), (f"{name}_scales", ("U8", groups))]


def num_parameters(header: Header) -> int:
    """Return the parameters that a header describes; four bits of a packed byte are one."""
    packed = {"blocks": 2, "scales": 0}
    return sum(math.prod(shape) * packed.get(name.rsplit("_", 1)[-1], 1) for name, (_, shape) in header.items())
