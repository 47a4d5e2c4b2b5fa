"""A model as far as memory depends on it, from its config.json and the headers of its files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from distill_cli.config.schema import LoraConfig
from distill_cli.models import model_files
from distill_cli.models.lora_names import Shapes, targeted

FAMILIES = {"qwen2", "qwen3", "llama", "mistral", "gemma3_text"}
"""`model_type` of the dense decoders whose layers are known here."""


class NoPrediction(Exception):
    """The model's files do not say what its memory depends on; the message says what is missing."""


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder, as far as memory depends on it. Widths are of whole layers, in elements."""

    vocab: int
    hidden: int
    query: int
    """Attention heads x head size."""
    key: int
    """Key-value heads x head size."""
    mlp: int
    num_heads: int
    num_key_heads: int
    num_layers: int
    layer_params: int
    """Elements of one layer, the largest."""
    tied: bool
    num_norms: int
    """Of the hidden states, in a layer."""
    has_head_norms: bool
    """Queries and keys are normalised."""
    float32_norms: bool
    """Norms keep their scaled input in float32 (Gemma)."""
    adapter_params: int | None = None
    """Elements of one layer's adapters, the largest, where they are trained and all else is frozen."""

    @property
    def root_params(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def num_params(self) -> int:
        return self.num_layers * self.layer_params + self.root_params

    # The one place for a student of which only a part is trained: what of a layer, and of the root, has gradients and
    # optimizer state.
    @property
    def trained_layer_params(self) -> int:
        return self.layer_params if self.adapter_params is None else self.adapter_params

    @property
    def trained_root_params(self) -> int:
        return self.root_params if self.adapter_params is None else 0

    @property
    def trained_params(self) -> int:
        return self.num_layers * self.trained_layer_params + self.trained_root_params


def read_shape(folder: Path, lora: LoraConfig | None = None) -> ModelShape:
    """Raises NoPrediction."""
    shapes = model_files.shapes(folder)
    shape = shape_of(model_files.read_config(folder), shapes)
    return with_adapters(shape, shapes, lora) if lora and lora.is_on else shape


def with_adapters(shape: ModelShape, shapes: Shapes, lora: LoraConfig) -> ModelShape:
    """The model frozen, with adapters beside the layers that they are for."""
    sizes: dict[str, int] = {}
    for name, (rows, columns) in targeted(shapes, lora.targets).items():
        layer = re.search(r"\blayers\.\d+\.", name)[0]
        sizes[layer] = sizes.get(layer, 0) + lora.rank * (rows + columns)
    return replace(shape, adapter_params=max(sizes.values()))


def shape_of(config: dict, shapes: dict[str, tuple[int, ...]]) -> ModelShape:
    """From what config.json holds and each tensor's shape. Raises NoPrediction."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise NoPrediction(f"the family {family} is none of {', '.join(sorted(FAMILIES))}")
    if "quantization_config" in config:
        raise NoPrediction("its weights are quantized")
    layers: dict[int, int] = {}
    for name, shape in shapes.items():
        if match := re.search(r"\blayers\.(\d+)\.", name):
            layers[int(match[1])] = layers.get(int(match[1]), 0) + math.prod(shape)

    def rows_of(suffix: str) -> tuple[int, ...]:
        found = [shape for name, shape in shapes.items() if name.endswith(suffix)]
        if not found or len(found[0]) != 2:
            raise NoPrediction(f"no matrix is called ...{suffix}")
        return found[0]

    heads = config.get("num_attention_heads")
    if not heads:
        raise NoPrediction("config.json has no num_attention_heads")
    vocab, hidden = rows_of("embed_tokens.weight")
    query, key = rows_of("layers.0.self_attn.q_proj.weight")[0], rows_of("layers.0.self_attn.k_proj.weight")[0]
    norms = [name for name in shapes if re.search(r"\blayers\.0\.\w*norm\.weight$", name)]
    return ModelShape(
        vocab=vocab,
        hidden=hidden,
        query=query,
        key=key,
        mlp=rows_of("layers.0.mlp.gate_proj.weight")[0],
        num_heads=heads,
        num_key_heads=key * heads // query,
        num_layers=len(layers),
        layer_params=max(layers.values()),
        tied=config.get("tie_word_embeddings", family == "gemma3_text"),
        num_norms=len(norms),
        has_head_norms=any(name.endswith("self_attn.q_norm.weight") for name in shapes),
        float32_norms=family == "gemma3_text",
    )
