"""Predict the trainer's memory at each moment of an optimizer update; the package's docstring has the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill_cli.config.derived import micro_batches_per_update
from distill_cli.config.schema import Checkpointing, Config, MeshConfig, Precision, TrainConfig
from distill_cli.losses.chunks import chunk_size
from distill_cli.memory.shape import ModelShape

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
TOPK_BYTES = 45
"""Bytes of the fused head's small tensors per token of a chunk and token of its top-k (measured)."""
FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """An optimizer update, as far as a rank's memory depends on it."""

    train: TrainConfig
    mesh: MeshConfig
    tokens: int
    """Tokens of a packed row, at most; context ranks share it."""
    topk: int
    micro_batches: int = 1
    """Micro-batches of a rank per update."""
    parameter_ranks: int = 1
    """Ranks that share the parameters."""
    on_gpu: bool = False

    @classmethod
    def of(cls, config: Config, *, num_ranks: int, on_gpu: bool) -> Step:
        """Return the update of a config, with sequences of the greatest length."""
        train, mesh = config.train, config.mesh
        copies = num_ranks // (mesh.tensor * mesh.context)
        sequences = math.ceil(train.global_batch_size / copies)
        tokens = min(train.micro_batch_tokens, sequences * config.rollout.max_sequence_length)
        micro_batches = micro_batches_per_update(config, num_ranks=num_ranks)
        sharers = max(copies // mesh.replicate, 1) * mesh.context
        return cls(train, mesh, tokens, config.loss.topk, micro_batches, sharers, on_gpu)

    @property
    def computed(self) -> int:
        """Bytes of a computed element."""
        return FLOAT32 if self.train.precision is Precision.fp32 else 2


@dataclass(frozen=True)
class Moment:
    """The trainer's memory at one moment of an update: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Activations:
    """Bytes kept for the backward pass on one rank, derived from what transformers' layers save."""

    def __init__(self, shape: ModelShape, step: Step) -> None:
        c, mesh, checkpointing = step.computed, step.mesh, step.train.activation_checkpointing
        tokens = step.tokens / mesh.context
        hidden = tokens * shape.hidden / (mesh.tensor if mesh.sequence_parallel else 1)  # elements between layers
        whole_hidden = tokens * shape.hidden
        query, key, mlp = (tokens * width / mesh.tensor for width in (shape.query, shape.key, shape.mlp))

        def norm(elements: float) -> float:
            """Return the bytes of the float32 input, and of the normalised one for the weight's gradient."""
            scaled = FLOAT32 if shape.float32_norms else c
            return elements * (FLOAT32 + (scaled if shape.adapter_params is None else 0))

        norms = shape.num_norms * norm(hidden) + 2 * c * whole_hidden
        head_norms = norm(query + key) if shape.has_head_norms else 0
        attention = c * (3 * query + 2 * mesh.context * key)  # queries, output twice; whole keys, values
        everything = norms + head_norms + attention + c * 4 * mlp
        products = query + 2 * key + 2 * mlp + 2 * whole_hidden
        selective, full = c * (hidden + products + query), c * hidden
        self.kept = {"none": everything, "selective": selective, "full": full}[checkpointing.value]
        """A layer after its forward pass."""
        own_input = c * hidden if c < FLOAT32 and checkpointing is not Checkpointing.none else 0
        self.at_work = everything + own_input + c * (whole_hidden + 2 * mlp)
        """A layer during its MLP's backward pass: everything, and three gradients."""
        self.last_norm = norm(hidden) + c * whole_hidden
        self.mlp_input = c * whole_hidden
        """Input of attention and MLP, whole on each rank."""


def trainer_moments(shape: ModelShape, step: Step) -> list[Moment]:
    """Return every moment of an optimizer update that can be the peak."""
    c, s, tensor, activations = step.computed, step.parameter_ranks, step.mesh.tensor, Activations(shape, step)
    layer, root = shape.layer_params / tensor, shape.root_params / tensor
    frozen = shape.adapter_params is not None
    own_layer = shape.trained_layer_params / (1 if frozen else tensor)  # adapters are hardly cut
    own_root = shape.trained_root_params / tensor
    weights = FLOAT32 * shape.num_params / tensor
    if frozen:
        weights = c * shape.num_params / tensor + FLOAT32 * shape.num_layers * own_layer
        layer += own_layer
    own = shape.num_layers * own_layer + own_root
    table = shape.vocab * shape.hidden / tensor if own_root else 0
    on_device = 0 if step.on_gpu and step.train.cpu_offload else 1
    optimizer = on_device * 8 * own / s
    rests_on_host = step.on_gpu and step.train.offload_optimizer
    resting = {"weights": on_device * weights / s, "optimizer": 0 if rests_on_host else optimizer}
    reduced = on_device * FLOAT32 / s  # bytes of a reduced gradient's element
    fetched = c * layer if s > 1 else 0  # one flat buffer, in addition to the parameters copied out of it
    head_output = FLOAT32 * (step.tokens / step.mesh.context) * (step.topk + 6) * step.micro_batches
    waiting = FLOAT32 * own if step.micro_batches > 1 else 0
    moments = []

    def add(name: str, *, loss: float = head_output, **parts: float) -> None:
        parts = resting | {"loss": loss} | parts
        moments.append(Moment(name, {part: round(parts.get(part, 0)) for part in PARTS}))

    kept = shape.num_layers * activations.kept + activations.last_norm
    loss = _loss_bytes(shape, step) + head_output
    add("the loss", gradients=waiting, gathered=c * root + fetched, activations=kept, loss=loss)
    for done in range(shape.num_layers):
        above = shape.num_layers - 1 - done  # layers whose backward pass is to come
        held = waiting - FLOAT32 * done * own_layer if waiting else 0
        held += done * own_layer * reduced + (FLOAT32 * own_layer if done else 0)  # the last reduction's input
        reducing = _reducing(own_layer, step) + held - (FLOAT32 * own_layer if done else 0)
        mlp_matrix = c * shape.mlp * shape.hidden / tensor if own_layer else 0
        gathered = c * (root + layer) + (fetched if above else 0)
        kept = above * activations.kept
        below_mlp = kept + activations.mlp_input
        for name, gradients, shards, active in (
            ("a layer's backward", held + mlp_matrix, gathered, kept + activations.at_work),
            ("a layer's backward", held + c * own_layer, gathered, below_mlp),
            ("a layer's reduction", reducing, gathered - c * layer, below_mlp),
        ):
            add(name, gradients=gradients, gathered=shards, activations=active, loss=c * table + head_output)
    held = shape.num_layers * own_layer * reduced + (FLOAT32 * own_root if waiting else 0)
    add("the embedding's backward", gradients=held + FLOAT32 * own_layer + 2 * c * table, gathered=c * root)
    add("the root's reduction", gradients=held + _reducing(own_root, step))
    if on_device:
        scratch = FLOAT32 * own / s if step.on_gpu else 2 * FLOAT32 * max(table, shape.mlp * shape.hidden) / s
        add("the optimizer's step", gradients=FLOAT32 * own / s + scratch, optimizer=optimizer)
    return moments


def _reducing(elements: float, step: Step) -> float:
    """Return the bytes while gradients are summed over ranks: whole ones, their float32 copy, and the sum."""
    s = step.parameter_ranks
    return elements * (3 * FLOAT32 if s == 1 else max(step.computed + FLOAT32, FLOAT32 + FLOAT32 / s))


def _loss_bytes(shape: ModelShape, step: Step) -> float:
    """Return the greatest memory of `linear_topk_loss`, of which the weight's gradient outlives it."""
    tokens, vocab = math.ceil(step.tokens / step.mesh.context), shape.vocab // step.mesh.tensor
    matrix, hidden = vocab * shape.hidden, tokens * shape.hidden
    chunk = chunk_size(vocab, shape.hidden, num_tokens=tokens)
    parts: list[float] = [
        FLOAT32 * matrix if shape.trained_root_params else 0,
        2 * FLOAT32 * chunk * vocab,
        2 * step.computed * hidden,  # the rows that have a loss, and their gradient
        TOPK_BYTES * chunk * step.topk,
    ]
    if step.computed < FLOAT32:
        parts.append(step.computed * chunk * vocab if step.on_gpu else FLOAT32 * (matrix + hidden))
    return sum(parts)
