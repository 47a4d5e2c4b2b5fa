"""What a model's config.json says of its layers: their kinds, experts, windows, quantization. No torch.

Families have different names for the same thing. Every name is tried on every family, so that a new family whose fields
are like another's needs no entry here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.models import known_families, model_files

WITHOUT_STATE = {
    *("full_attention", "sliding_attention", "chunked_attention", "window_attention", "indexed_attention"),
    *("attention", "deepseek_sparse_attention", "qwen_sparse_attention", "mlp", "moe", "dense", "sparse"),
}
"""Kinds of layers in which a token sees others through a mask or not at all. Any other kind is taken to carry state."""
RECURRENT_FAMILIES = {"rwkv": "recurrent", "xlstm": "recurrent"}
"""model_type -> kind of all layers, for families of which no field says it."""
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Letters of `hybrid_override_pattern` (Nemotron-H)."""
LINEAR_FIELDS = ("linear_num_value_heads", "linear_num_key_heads", "linear_conv_kernel_dim")
MAMBA_FIELDS = ("mamba_d_state", "mamba_d_conv", "ssm_state_size", "state_size", "time_step_rank")
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
NUM_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_SIZE = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
EXPERTS_ON = ("enable_moe_block", "is_moe")
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
OTHER_INPUTS = ("vision_config", "audio_config", "text_config")
QUANTIZATIONS = ("quantization_config", "compression_config")
POSITIVE = ("hidden_size", "num_attention_heads", "head_dim", "num_hidden_layers", "max_position_embeddings")
NUMBERS = (*POSITIVE, "intermediate_size", "num_key_value_heads", "sliding_window")
"""Fields of most families that are numbers; in some a list, of one for each layer."""
FLAGS = ("tie_word_embeddings", "is_encoder_decoder")


@dataclass(frozen=True)
class Experts:
    """The experts of a layer that has them."""

    number: int
    per_token: int
    """Experts that compute a token."""
    shared: int
    """Experts in addition that compute every token; 0 if config.json does not say."""


@dataclass(frozen=True)
class Traits:
    """What checks and predictions need to know of a model; of a multimodal one, of the text model in it."""

    family: str | None
    """`model_type` of config.json, which for a multimodal model is the whole one's."""
    num_layers: int | None
    kinds: tuple[str, ...]
    """The kind of each layer, by the name in config.json; empty if it says nothing of them."""
    experts: Experts | None
    is_multimodal: bool
    is_encoder_decoder: bool
    quantization: str | None
    """Method by which the weights are quantized."""
    window: int | None
    """Tokens that the layers with the smallest window see."""
    soft_cap: float | None
    """Soft cap of the logits."""
    has_own_attention: bool
    """Its code computes attention itself, past transformers' interface of attention functions."""
    tunes_by_place: bool
    """Attention's temperature grows with a token's place in the row (Llama 4)."""
    chooses_keys: bool
    """An indexer chooses the keys that a query sees (DeepSeek-V3.2)."""
    has_router_loss: bool
    """Its code has an auxiliary loss that balances its experts."""

    @classmethod
    def read(cls, folder: Path) -> Traits:
        """Read a model's folder. Raises ConfigError, with the folder, if config.json contradicts itself."""
        try:
            return cls.of(model_files.read_config(folder), folder=folder)
        except ValueError as error:
            raise ConfigError(f"{folder / 'config.json'}: {error}; correct it, or download the model again") from error

    @classmethod
    def of(cls, config: Mapping[str, Any], *, folder: Path | None = None) -> Traits:
        """Read the content of config.json. Raises ValueError if a field has a value that cannot be.

        Args:
            folder: where the model's own code is, if it has some.
        """
        text = model_files.text_config(config)
        _check_types(config, text)
        num_layers, kinds = _number(text, NUM_LAYERS), tuple(_kinds(text))
        lists_mlps = bool({"mlp", "moe"} & {*kinds})
        method = [one for part in (config, text) for name in QUANTIZATIONS if (one := part.get(name))]
        is_windowed, code = text.get("use_sliding_window", True), _code(config, text, folder)
        return cls(
            family=config.get("model_type"),
            num_layers=num_layers or len(kinds) or None,
            kinds=kinds,
            experts=None if lists_mlps and "moe" not in kinds else _experts(text),
            is_multimodal=any(isinstance(config.get(name), dict) for name in OTHER_INPUTS),
            is_encoder_decoder=bool(config.get("is_encoder_decoder")),
            quantization=_method(method[0]) if method else None,
            window=_number(text, WINDOWS) if is_windowed else None,
            soft_cap=text.get("final_logit_softcapping"),
            has_own_attention=known_families.has_own_attention(code),
            tunes_by_place="llama4" in str(text.get("model_type")) and text.get("attn_temperature_tuning") is not False,
            chooses_keys=bool(text.get("index_topk")),
            has_router_loss=known_families.ROUTER_LOSS in code,
        )

    @property
    def stateful_kinds(self) -> tuple[str, ...]:
        """Kinds of layers that carry state from token to token, and so from one document of a row into the next."""
        return tuple(dict.fromkeys(kind for kind in self.kinds if kind not in WITHOUT_STATE))

    @property
    def uncut(self) -> tuple[str, ...]:
        """Parts of the layers that tensor-parallel ranks cannot share, in words."""
        return (*(f"{kind} layers" for kind in self.stateful_kinds), *(["experts"] if self.experts else []))

    @property
    def needs_rows(self) -> tuple[str, ...]:
        """Why a student must have rows of one document each, in words; empty if packed rows are right too."""
        kinds = ", ".join(self.stateful_kinds)
        reasons = {
            f"its {kinds} layers carry state": bool(kinds),
            "its attention is code of its own": self.has_own_attention,
            "its attention counts tokens from the row's begin": self.tunes_by_place,
        }
        return tuple(reason for reason, holds in reasons.items() if holds)


def _check_types(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raise ValueError if a field that is read here has a value that cannot be."""
    for name in (*NUMBERS, *NUM_LAYERS, *NUM_EXPERTS, *PER_TOKEN):
        value = text.get(name)
        least = int(name in POSITIVE)
        for number in value if isinstance(value, list) else [least if value is None else value]:
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name}={value!r:.60}, must be a number from {least}")
    for name in FLAGS:
        if not isinstance(text.get(name, False), bool):
            raise ValueError(f"{name}={text[name]!r:.60}, must be true or false")
    if not isinstance(family := config.get("model_type"), str | None):
        raise ValueError(f"model_type={family!r:.60}, must be a text")
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"architectures={classes!r:.60}, must be a list of texts")


def _code(config: Mapping[str, Any], text: Mapping[str, Any], folder: Path | None) -> str:
    """Return the source of the model: its folder's own, or that of transformers."""
    if config.get("auto_map") and folder is not None:
        return "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("*.py")))
    return known_families.source_of(str(text.get("model_type") or config.get("model_type")), "modeling")


def _kinds(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the kind of each layer from whichever field lists them."""
    for name in ("layer_types", "layers_block_type"):
        if (kinds := config.get(name)) is not None:
            number = _number(config, NUM_LAYERS)
            if len(_list_of(str, name, kinds)) != (number or len(kinds)):
                raise ValueError(f"{name} names {len(kinds)} layers, and there are {number}")
            return kinds
    if pattern := config.get("hybrid_override_pattern"):
        return [PATTERN.get(letter, letter) for letter in str(pattern)]
    layers = range(_number(config, NUM_LAYERS) or 0)
    if cycle := config.get("block_types") or config.get("_block_types"):  # RecurrentGemma
        cycle = _list_of(str, "block_types", cycle)
        return [cycle[layer % len(cycle)] for layer in layers]
    if flags := config.get("attn_type_list"):  # MiniMax
        return ["full_attention" if flag else "linear_attention" for flag in _list_of(int, "attn_type_list", flags)]
    if (family := config.get("model_type")) in RECURRENT_FAMILIES:
        return [RECURRENT_FAMILIES[family]] * len(layers)
    other, attention = _attention_layers(config, layers)
    return ["full_attention" if layer in attention else other for layer in layers] if other else []


def _attention_layers(config: Mapping[str, Any], layers: range) -> tuple[str | None, set[int]]:
    """Return the kind of the layers that carry state, None if there are none, and the layers of attention alone."""

    def listed(name: str, values: Any) -> set[int]:
        return {*_list_of(int, name, values)}

    if (indices := config.get("full_attn_idxs")) is not None:  # LFM2
        return "conv", listed("full_attn_idxs", indices)
    if isinstance(linear := config.get("linear_attn_config"), dict):  # Kimi Linear counts from 1
        return "linear_attention", {layer - 1 for layer in listed("full_attn_layers", linear.get("full_attn_layers"))}
    if any(config.get(name) is not None for name in LINEAR_FIELDS):
        interval = _number(config, ("full_attention_interval",)) or 4  # the default of Qwen3-Next
        return "linear_attention", {layer for layer in layers if (layer + 1) % interval == 0}
    if not any(config.get(name) is not None for name in MAMBA_FIELDS):
        return None, set()
    if (indices := config.get("attn_layer_indices")) is not None:  # Bamba
        return "mamba", listed("attn_layer_indices", indices)
    if period := _number(config, ("attn_layer_period",)):  # Jamba
        offset = _number(config, ("attn_layer_offset",)) or 0
        return "mamba", {layer for layer in layers if layer % period == offset}
    return "mamba", set()


def _experts(config: Mapping[str, Any]) -> Experts | None:
    number = _number(config, NUM_EXPERTS)
    if number is None or number < 2 or False in (config.get(name) for name in EXPERTS_ON):
        return None
    shared = _number(config, NUM_SHARED)
    if shared is None:
        shared = 1 if _number(config, SHARED_SIZE) else 0
    return Experts(number, min(_number(config, PER_TOKEN) or 1, number), shared)


def _number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return the first field that is a number; the largest number of a list, which has one for each layer."""
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value:
            value = max(_list_of(int, name, value))
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _list_of(kind: type, name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name}={values!r:.60}, must be a list of {kind.__name__}")
    return values


def _method(quantization: Any) -> str:
    found = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(found or "by an unknown method")
