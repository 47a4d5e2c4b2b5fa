"""Read the part of a model that its memory depends on, from its config.json and the headers of its files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill_cli.config.schema import LoraConfig
from distill_cli.memory.layers import IN_LAYER, LayerShape, Shapes, UnknownLayer, in_layers, read_layer
from distill_cli.models import model_files
from distill_cli.models.lora_names import targeted
from distill_cli.models.tensor_names import EMBEDDING, HEAD, text_tensors
from distill_cli.models.traits import Traits

FLOAT32_NORMS = (
    *("afmoe", "flex_olmo", "gemma", "gpt_oss", "helium", "llama4", "minimax_m3", "nemotron_h", "olmo2", "olmo3"),
    *("olmo_hybrid", "qwen3_5", "qwen3_next", "qwen4", "recurrent_gemma", "vaultgemma"),
)
"""Beginnings of `model_type` of the families whose norms multiply by their weight in float32. No field says it."""


class NoPrediction(Exception):
    """The model's files do not say what its memory depends on; the message names what is missing."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder, as far as memory depends on it. Widths are those of whole layers, in elements."""

    vocab: int
    hidden: int
    layers: tuple[LayerShape, ...]
    root_params: int
    """Elements of everything outside the layers: embedding, last norm, head."""
    num_heads: int
    float32_norms: bool = False
    """Norms keep their scaled input in float32 (Gemma)."""
    has_scores: bool = False
    """Attention on CPUs makes its scores: it caps them (Gemma 2), or has sinks (gpt-oss)."""
    caps_scores: bool = False
    has_soft_cap: bool = False
    """The logits are capped."""
    has_state: bool = False
    """Some layers carry state: context ranks cannot share a sequence."""
    num_experts: int = 0
    family: str | None = None

    @property
    def is_frozen(self) -> bool:
        """Adapters alone are trained."""
        return self.layers[0].adapters is not None

    @property
    def num_key_heads(self) -> int:
        attention = next((layer for layer in self.layers if layer.query), self.layers[0])
        return attention.key * self.num_heads // max(attention.query, 1)

    @property
    def num_params(self) -> int:
        return sum(layer.params for layer in self.layers) + self.root_params

    @property
    def trained_root_params(self) -> int:
        return 0 if self.is_frozen else self.root_params

    @property
    def trained_params(self) -> int:
        """Elements that have gradients and optimizer state."""
        return sum(layer.trained for layer in self.layers) + self.trained_root_params


def read_shape(folder: Path, lora: LoraConfig | None = None) -> ModelShape:
    """Return the shape of the model in a folder, with adapters if `lora` is on.

    Raises:
        NoPrediction: its layers are not known.
        ConfigError: its files are damaged.
    """
    Traits.read(folder)
    return shape_of(model_files.read_config(folder), model_files.shapes(folder), lora)


def shape_of(config: Mapping[str, Any], shapes: Shapes, lora: LoraConfig | None = None) -> ModelShape:
    """Return the shape from the content of config.json and each tensor's shape. Raises NoPrediction."""
    traits, text = Traits.of(config), model_files.text_config(config)
    if traits.quantization:
        raise NoPrediction("its weights are quantized")
    tensors = text_tensors(shapes)
    tables = [shape for name, shape in tensors.items() if EMBEDDING.search(name)]
    if len(tables) != 1 or len(tables[0]) != 2:
        raise NoPrediction("no matrix is called embed_tokens, wte or by another name of an embedding")
    (vocab, hidden), family = tables[0], text.get("model_type")
    by_layer = in_layers(tensors)
    adapters: list[int | None] = [None] * len(by_layer)
    if lora and (rank := lora.rank):
        found = in_layers({f"{name}.": sides for name, sides in targeted(shapes, lora.targets).items()})
        adapters = [rank * sum(map(sum, layer.values())) for layer in found]
    try:
        layers = [read_layer(layer, text, traits.experts, hidden) for layer in by_layer]
    except UnknownLayer as error:
        raise NoPrediction(f"{family}: {error}") from error
    if not layers or len(adapters) != len(layers):
        raise NoPrediction(f"{family}: its layers are not called layers.<n>")
    root = {name: math.prod(shape) for name, shape in tensors.items() if not IN_LAYER.search(name)}
    if text.get("tie_word_embeddings", config.get("tie_word_embeddings")):
        root = {name: size for name, size in root.items() if not HEAD.search(name)}  # it may be stored, and is not read
    caps_scores = bool(text.get("attn_logit_softcapping"))
    return ModelShape(
        vocab=vocab,
        hidden=hidden,
        layers=tuple(replace(layer, adapters=own) for layer, own in zip(layers, adapters, strict=True)),
        root_params=sum(root.values()),
        num_heads=next((text[name] for name in NUM_HEADS if text.get(name)), 1),
        float32_norms=str(family).startswith(FLOAT32_NORMS),
        has_scores=caps_scores or any(name.endswith(".sinks") for name in tensors),
        caps_scores=caps_scores,
        has_soft_cap=traits.soft_cap is not None,
        has_state=bool(traits.needs_rows),
        num_experts=traits.experts.number if traits.experts else 0,
        family=family,
    )


NUM_HEADS = ("num_attention_heads", "n_head", "n_heads")
