"""Read from a layer's tensors how many elements per token it keeps for its backward pass.

A layer is attention or a mixer that carries state, then an MLP or experts, with norms around them; what it is made of
shows in the names and sides of its matrices, whatever its family. Numbers are elements per token, to be multiplied by
the bytes of a computed element.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_cli.models.param_counts import expert_shapes
from distill_cli.models.tensor_names import is_router
from distill_cli.models.traits import Experts

Shapes = Mapping[str, tuple[int, ...]]

OUTPUT = re.compile(r"(?:^|\.)(?:o_proj|out_proj|dense|c_proj|wo)$")
"""The matrix that leads from attention's heads, or a mixer's channels, back to the hidden states."""
DOWN = re.compile(r"(?:down|fc2|fc_out|c_proj|4h_to_h|(?<!\w)w2|output_linear|(?<!\w)wo)")
"""The matrix that leads from an MLP back to the hidden states."""
FUSED = re.compile(r"(?:^|\.)(?:qkv_proj|query_key_value|c_attn|Wqkv|att_proj)$")
ATTENTION = re.compile(r"(?:^|\.)(?:q_proj|k_proj|q_b_proj|kv_b_proj|qkv_proj|query_key_value|c_attn|Wqkv|att_proj)$")
LATENT = re.compile(r"(?:^|\.)(?:q_a_proj|kv_a_proj_with_mqa)$")
HEAD_NORM = re.compile(r"(?:^|\.)(?:q|query)_?(?:layer)?norm\b")
NORM = re.compile(r"norm|(?:^|\.)ln_?\w*$")
STATE = re.compile(r"(?:^|\.)(?:\w*conv1?d?|A_log)$")

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
ACTIVATIONS = {"relu": -1, "quick_gelu": 1, "gelu_new": 4, "gelu_fast": 4}
"""Elements that an activation keeps besides its input and output; ReLU does not keep its input."""


@dataclass(frozen=True)
class LayerShape:
    """A layer, as far as memory depends on it."""

    params: int
    adapters: int | None = None
    """Elements of its adapters, with all other weights frozen; None if all weights are trained."""
    routed_params: int = 0
    """Elements of its experts, which `mesh.expert` cuts; in `params` too."""
    mlp_matrix: int = 0
    """Elements of the largest parameter of MLP or experts."""
    query: int = 0
    """Attention heads x head size."""
    key: int = 0
    """Key-value heads x head size."""
    mlp: int = 0
    """Width of the MLP, shared experts included."""
    activation: int = 0
    """Elements per element of the MLP's width that its activation keeps besides its input and its output."""
    mlp_wide: int = 0
    """Elements that its projections from the hidden states make: twice its width if it is gated."""
    routed: int = 0
    """Elements that the chosen experts keep of a token."""
    routed_inputs: int = 0
    """Those among them that only the gradients of experts need: inputs of their matrices."""
    routed_at_work: int = 0
    """Elements that their backward pass adds."""
    other: int = 0
    """Elements that attention keeps besides queries, keys, values and output: fused or gated projections, latents."""
    state: int = 0
    """Elements that a mixer with state keeps."""
    state_float32: int = 0
    """Elements that it keeps in float32 in addition."""
    state_wide: int = 0
    """Elements that its projections from the hidden states make."""
    state_products: int = 0
    """Elements of its other matrix products, in float32."""
    halves: int = 2
    """Inputs of attention, mixer, MLP and experts."""
    norms: int = 2
    """Norms of the hidden states."""
    has_head_norms: bool = False
    """Queries and keys are normalised."""
    has_plain_norms: bool = False
    """Norms are torch's LayerNorm, which keeps its input alone."""

    @property
    def trained(self) -> int:
        """Elements that have gradients and optimizer state."""
        return self.params if self.adapters is None else self.adapters

    @property
    def mlp_kept(self) -> int:
        """Elements that the MLP keeps: its projections, the activation, and the product of a gated one's."""
        return self.mlp_wide + self.mlp * (self.activation + (2 if self.mlp_wide >= 2 * self.mlp else 1))

    def params_of(self, num_expert_ranks: int) -> float:
        """Return the elements that a rank gathers."""
        return self.params - self.routed_params * (1 - 1 / num_expert_ranks)

    def mlp_matrix_of(self, num_expert_ranks: int) -> float:
        """Return the elements of the largest gradient in MLP or experts; adapters leave experts without one."""
        if not self.routed:
            return self.mlp_matrix
        return self.mlp_matrix / num_expert_ranks if self.adapters is None else 0


class UnknownLayer(Exception):
    """A layer's tensors are not laid out as any of the known ones; the message says what is missing."""


def read_layer(tensors: Shapes, config: Mapping[str, Any], experts: Experts | None, hidden: int) -> LayerShape:
    """Return the shape of a layer without adapters.

    Args:
        tensors: those of the layer alone, by the rest of their names.
        config: the text model's.

    Raises:
        UnknownLayer: it has no part that is known.
    """
    routed = expert_shapes(tensors, experts)
    plain = {name: shape for name, shape in tensors.items() if name not in routed and not is_router(f".{name}")}
    matrices = {name.removesuffix(".weight"): shape for name, shape in plain.items() if len(shape) == 2}
    vectors = [name for name, shape in plain.items() if shape == (hidden,)]
    parents = {_parent(name) for name in matrices}
    with_state = {_parent(name.removesuffix(".weight")) for name in plain if STATE.search(name.removesuffix(".weight"))}
    attending = {_parent(name) for name in matrices if ATTENTION.search(name)} - with_state
    mlps = parents - with_state - attending
    found: dict[str, Any] = {}
    for parent in attending:
        found |= _attention(_inside(matrices, parent), config, hidden)
    found["has_head_norms"] = any(HEAD_NORM.search(name) for name in plain if _parent(name) and attending)
    dense = {name: shape for parent in mlps for name, shape in _inside(matrices, parent).items() if hidden in shape}
    if dense:
        name = next((config[key] for key in ACTIVATION_FIELDS if config.get(key)), "")
        found |= _mlp(dense, hidden) | {"activation": ACTIVATIONS.get(name, 0)}
    mixers = ({name: shape for name, shape in plain.items() if _inside_any(name, {parent})} for parent in with_state)
    for mixer in mixers:
        found |= _state(mixer, config, hidden)
    if routed and experts:
        found |= _experts(routed, config, experts, hidden)
    names = [name for name in vectors if NORM.search(_parent(name)) and not _inside_any(name, attending | with_state)]
    halves = bool(attending) + bool(with_state) + bool(dense or routed)
    if not halves:
        raise UnknownLayer(f"no attention and no MLP among {', '.join(sorted(tensors))[:100]}")
    return LayerShape(
        params=sum(map(math.prod, tensors.values())),
        routed_params=sum(map(math.prod, routed.values())),
        halves=halves,
        norms=len([name for name in names if not name.endswith(".bias")]) or halves,
        has_plain_norms=not names or any(name.endswith(".bias") for name in names),
        **found,
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(matrices: Shapes, parent: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in matrices.items() if _parent(name) == parent}


def _inside_any(name: str, parents: set[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


def _width(shape: tuple[int, ...], hidden: int) -> int:
    """Return the side of a matrix that is not the hidden size."""
    return shape[0] if shape[-1] == hidden else shape[-1]


def _attention(matrices: Shapes, config: Mapping[str, Any], hidden: int) -> dict[str, int]:
    output = sum(_width(shape, hidden) for name, shape in matrices.items() if OUTPUT.search(name))
    if not output:
        raise UnknownLayer(f"no output matrix of attention among {', '.join(sorted(matrices))}")
    widths = {name.rpartition(".")[2]: _width(shape, hidden) for name, shape in matrices.items()}
    if "kv_b_proj" in widths:  # MLA
        rows = {name.rpartition(".")[2]: shape[0] for name, shape in matrices.items()}
        query = rows.get("q_b_proj") or rows["q_proj"]
        latents = sum(rows[name] for name in rows if LATENT.search(name))
        return {"query": output, "key": query, "other": rows["kv_b_proj"] + 2 * latents}
    fused = [width for name, width in widths.items() if FUSED.search(name)]
    has_positions = any("rope" in name or "rotary" in name for name in config)
    if fused:
        key = (fused[0] - output) // 2
        return {"query": output, "key": key, "other": (output + key) if has_positions else -output}
    query, key = widths.get("q_proj", output), widths.get("k_proj", 0)
    gate = 3 * output if query == 2 * output else 0
    return {"query": output, "key": key, "other": gate}


def _mlp(matrices: Shapes, hidden: int) -> dict[str, int]:
    down = {name: shape for name, shape in matrices.items() if DOWN.search(name.rpartition(".")[2])}
    inner = sum(_width(shape, hidden) for shape in down.values())
    wide = sum(_width(shape, hidden) for name, shape in matrices.items() if name not in down)
    return {"mlp": inner, "mlp_wide": wide, "mlp_matrix": max(map(math.prod, matrices.values()))}


def _experts(tensors: Shapes, config: Mapping[str, Any], experts: Experts, hidden: int) -> dict[str, int]:
    matrices = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if hidden in shape[-2:]}
    matrices = {name: shape for name, shape in matrices.items() if not name.endswith("bias")}
    down = [shape for name, shape in matrices.items() if DOWN.search(name.rpartition(".")[2])]
    if not down:
        raise UnknownLayer(
            f"no matrix of an expert leads back to the hidden states: {', '.join(sorted(matrices))[:100]}"
        )
    inner = _width(down[0][-2:], hidden)
    total, inner_total = sum(map(math.prod, matrices.values())), sum(map(math.prod, down))
    is_gated, is_clamped = total >= 3 * inner_total, "swiglu_limit" in config
    kept = (4 if is_gated else 2) + (3 if is_clamped else 0)
    each = experts.number if config.get("model_type") in EVERY_EXPERT else experts.per_token
    return {
        "routed": each * (2 * hidden + kept * inner),
        "routed_inputs": each * (hidden + inner),
        "routed_at_work": each * (hidden + 2 * inner),
        "mlp_matrix": total - inner_total,  # gate and up are one parameter
    }


EVERY_EXPERT = {"llama4_text"}
"""Families in which every expert computes every token."""


def _state(tensors: Shapes, config: Mapping[str, Any], hidden: int) -> dict[str, int]:
    """Return the elements that a mixer keeps, as transformers' own code does (measured).

    Args:
        tensors: those of one mixer.
    """
    matrices = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if len(shape) == 2}
    wide = sum(_width(shape, hidden) for name, shape in matrices.items() if not OUTPUT.search(name))
    inner = sum(_width(shape, hidden) for name, shape in matrices.items() if OUTPUT.search(name))

    def number(*names: str) -> int:
        found = (config[name] for name in names if config.get(name) is not None)
        return next(found, 0)

    if not any(name.endswith("A_log") for name in tensors):  # short convolutions between two gates (LFM2)
        return {"state": wide + 3 * inner, "state_wide": wide}
    if heads := number("linear_num_value_heads"):  # the gated delta rule (Qwen3-Next), by chunks
        key, value = number("linear_key_head_dim"), number("linear_value_head_dim")
        each, states = heads * (key + value), heads * key * value // DELTA_CHUNK
        computed = 6 * number("linear_num_key_heads") * key + 7 * each
        in_float32, products = 4 * each + 5 * DELTA_CHUNK * heads + states, heads * (2 * DELTA_CHUNK + 4 * value)
        return {"state": computed, "state_float32": in_float32, "state_wide": wide, "state_products": products}
    heads, size = number("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), number("mamba_d_state", "ssm_state_size")
    if not (heads and size):
        raise UnknownLayer("the memory of its layers with state is not known")
    chunk = number("mamba_chunk_size", "chunk_size")  # Mamba 2, by chunks
    in_float32 = 10 * inner + heads * (5 * size + 4 * chunk) + 3 * inner * size // chunk
    return {"state": wide, "state_float32": in_float32, "state_wide": wide, "state_products": 2 * inner}


DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule."""
IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def in_layers(tensors: Shapes) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors of each layer, by the rest of their names, in the order of the layers."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        if match := IN_LAYER.search(name):
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = shape
    return [layers[index] for index in sorted(layers)]
