"""Read the part of a model that its memory depends on, from its config.json and the headers of its files."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.config.schema import LoraConfig
from distill_cli.models import model_files
from distill_cli.models.lora_names import Shapes, targeted

FAMILIES = {"qwen2", "qwen3", "llama", "mistral", "gemma3_text"}
"""`model_type` of the dense decoders with a known layout."""


class NoPrediction(Exception):
    """The model's files do not say what its memory depends on; the message names what is missing."""


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder, as far as memory depends on it. Widths are those of whole layers, in elements."""

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
    """Elements of the largest layer."""
    tied: bool
    """The head is the embedding."""
    num_norms: int
    """Norms of the hidden states in a layer."""
    has_head_norms: bool
    """Queries and keys are normalised."""
    float32_norms: bool
    """Norms keep their scaled input in float32 (Gemma)."""
    adapter_params: int | None = None
    """Elements of the largest layer's adapters, with all other weights frozen; None if all weights are trained."""

    @property
    def root_params(self) -> int:
        """Elements of embedding, last norm and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def num_params(self) -> int:
        return self.num_layers * self.layer_params + self.root_params

    @property
    def trained_layer_params(self) -> int:
        """Elements of a layer that have gradients and optimizer state."""
        return self.layer_params if self.adapter_params is None else self.adapter_params

    @property
    def trained_root_params(self) -> int:
        return self.root_params if self.adapter_params is None else 0

    @property
    def trained_params(self) -> int:
        return self.num_layers * self.trained_layer_params + self.trained_root_params


def read_shape(folder: Path, lora: LoraConfig | None = None) -> ModelShape:
    """Return the shape of the model in a folder, with adapters if `lora` is on. Raises NoPrediction."""
    return shape_of(model_files.read_config(folder), model_files.shapes(folder), lora)


def shape_of(config: Mapping[str, Any], shapes: Shapes, lora: LoraConfig | None = None) -> ModelShape:
    """Return the shape from the content of config.json and each tensor's shape. Raises NoPrediction."""
    family, heads = config.get("model_type"), config.get("num_attention_heads")
    if family not in FAMILIES:
        raise NoPrediction(f"the family {family} is none of {', '.join(sorted(FAMILIES))}")
    if "quantization_config" in config:
        raise NoPrediction("its weights are quantized")
    if not heads:
        raise NoPrediction("config.json has no num_attention_heads")

    def matrix(suffix: str) -> tuple[int, ...]:
        shape = next((shape for name, shape in shapes.items() if name.endswith(suffix)), ())
        if len(shape) != 2:
            raise NoPrediction(f"no matrix is called ...{suffix}")
        return shape

    layers, adapter_params = _layer_sizes({name: math.prod(shape) for name, shape in shapes.items()}), None
    if lora and (rank := lora.rank):
        adapters = {name: rank * sum(sides) for name, sides in targeted(shapes, lora.targets).items()}
        adapter_params = max(_layer_sizes(adapters))
    vocab, hidden = matrix("embed_tokens.weight")
    query, key = matrix("layers.0.self_attn.q_proj.weight")[0], matrix("layers.0.self_attn.k_proj.weight")[0]
    return ModelShape(
        vocab=vocab,
        hidden=hidden,
        query=query,
        key=key,
        mlp=matrix("layers.0.mlp.gate_proj.weight")[0],
        num_heads=heads,
        num_key_heads=key * heads // query,
        num_layers=len(layers),
        layer_params=max(layers),
        tied=config.get("tie_word_embeddings", family == "gemma3_text"),
        num_norms=sum(bool(re.search(r"\blayers\.0\.\w*norm\.weight$", name)) for name in shapes),
        has_head_norms=any(name.endswith("self_attn.q_norm.weight") for name in shapes),
        float32_norms=family == "gemma3_text",
        adapter_params=adapter_params,
    )


def _layer_sizes(elements: Mapping[str, int]) -> list[int]:
    """Return the elements of each layer, from those of each tensor."""
    sizes: dict[str, int] = {}
    for name, size in elements.items():
        if match := re.search(r"\blayers\.(\d+)\.", name):
            sizes[match[1]] = sizes.get(match[1], 0) + size
    return list(sizes.values())
