"""Predict the trainer's memory at each moment of an optimizer update; the package's docstring has the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill_cli.config.derived import micro_batches_per_update
from distill_cli.config.loss_schema import Support
from distill_cli.config.schema import Checkpointing, Config, MeshConfig, Precision, TrainConfig
from distill_cli.config.teachers import teacher_configs
from distill_cli.losses.chunks import chunk_size
from distill_cli.memory.layers import LayerShape
from distill_cli.memory.shape import ModelShape
from distill_cli.types import HiddenSize

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
TOPK_BYTES = 45
"""Bytes of the fused head's small tensors per token of a chunk and token of its top-k (measured)."""
BLOCK_ELEMENTS, BLOCKS = 2**18, 8
"""`losses.softmax.BLOCK_ELEMENTS`, and the tensors of that size while full distributions are compared on a CPU."""
HEAD_OUTPUTS = 18
"""Numbers that the head returns for a token (`HeadOutput`)."""
FLOAT32 = 4
QUERY_ROWS = 512
"""`student.attention.QUERY_ROWS`: queries whose scores exist at a time, where they exist."""


@dataclass(frozen=True)
class Step:
    """An optimizer update, as far as a rank's memory depends on it."""

    train: TrainConfig
    mesh: MeshConfig
    tokens: int
    """Tokens of a packed row, at most; context ranks share it."""
    topk: int
    """Ids of the support."""
    micro_batches: int = 1
    """Micro-batches of a rank per update."""
    parameter_ranks: int = 1
    """Ranks that share the parameters."""
    on_gpu: bool = False
    length: int = 0
    """Tokens of the longest sequence."""
    copies: int = 0
    """Copies of the trained parameters: those of moving teachers."""
    teachers: tuple[HiddenSize, ...] = ()
    """The teachers that return hidden states, whose heads the trainer has."""

    @classmethod
    def of(cls, config: Config, *, num_ranks: int, on_gpu: bool, teachers: Sequence[HiddenSize] = ()) -> Step:
        """Return the update of a config, with sequences of the greatest length; `teachers` as in the field."""
        train, mesh = config.train, config.mesh
        copies = num_ranks // (mesh.tensor * mesh.context)
        sequences = math.ceil(train.global_batch_size / copies)
        tokens = min(train.micro_batch_tokens, sequences * config.rollout.max_sequence_length)
        micro_batches = micro_batches_per_update(config, num_ranks=num_ranks)
        sharers = max(copies // mesh.replicate, 1) * mesh.context
        length = min(config.rollout.max_sequence_length, tokens)
        moving = sum(one.model.teacher.moves_apart for one in teacher_configs(config).values())
        support = config.loss.support
        ids = 0 if support is Support.full else config.loss.topk * (1 + (support is Support.union))
        return cls(train, mesh, tokens, ids, micro_batches, sharers, on_gpu, length, moving, tuple(teachers))

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
    """Bytes of a layer kept for the backward pass on one rank, derived from what transformers' layers save."""

    def __init__(self, shape: ModelShape, layer: LayerShape, step: Step) -> None:
        c, mesh, checkpointing = step.computed, step.mesh, step.train.activation_checkpointing
        tokens = step.tokens / mesh.context
        hidden = tokens * shape.hidden / (mesh.tensor if mesh.sequence_parallel else 1)  # elements between layers
        whole_hidden = tokens * shape.hidden
        query, key, mlp, wide, mlp_kept, other = (
            tokens * width / mesh.tensor
            for width in (layer.query, layer.key, layer.mlp, layer.mlp_wide, layer.mlp_kept, layer.other)
        )

        def norm(elements: float) -> float:
            """Return the bytes of the float32 input, and of the normalised one for the weight's gradient."""
            if layer.has_plain_norms:
                return c * elements
            scaled = FLOAT32 if shape.float32_norms else c
            return elements * (FLOAT32 + (scaled if layer.adapters is None else 0))

        norms = layer.norms * norm(hidden) + layer.halves * c * whole_hidden
        head_norms = norm(query + key) if layer.has_head_norms else 0
        kept_scores, made_scores = _scores(shape, layer, step)
        keys = max(query, key) if shape.has_scores and not step.on_gpu else key  # one for each head of the query
        attention = c * (3 * query + 2 * mesh.context * keys + other) + kept_scores  # queries, output twice; whole keys
        routed = layer.routed if layer.adapters is None else layer.routed - layer.routed_inputs
        everything = norms + head_norms + attention + c * mlp_kept + c * tokens * (routed + layer.state)
        everything += FLOAT32 * tokens * layer.state_float32
        products = query + 2 * key + wide + 2 * whole_hidden + tokens * layer.state_wide
        selective = c * (hidden + products + query) + FLOAT32 * tokens * layer.state_products
        full = c * hidden
        self.kept = {"none": everything, "selective": selective, "full": full}[checkpointing.value]
        """The layer after its forward pass."""
        own_input = c * hidden if c < FLOAT32 and checkpointing is not Checkpointing.none else 0
        self.at_work = everything + own_input + c * (whole_hidden + 2 * mlp + tokens * layer.routed_at_work)
        """The layer during its MLP's backward pass: everything, and three gradients."""
        self.last_norm = norm(hidden) + c * whole_hidden
        self.mlp_input = c * whole_hidden + made_scores
        """Input of attention and MLP, whole on each rank; scores that are made again."""


def _scores(shape: ModelShape, layer: LayerShape, step: Step) -> tuple[float, float]:
    """Return the bytes of attention's scores that a layer keeps, and of those made again.

    Only CPUs make them (`student.attention`): short documents keep them, others make some at a time in backward.
    """
    if not (shape.has_scores and layer.query) or step.on_gpu:
        return 0, 0
    c, number = step.computed, shape.num_heads * step.length
    each = FLOAT32 + c * shape.caps_scores + (c if c < FLOAT32 else 0)
    if step.length <= QUERY_ROWS:
        return each * number * step.tokens, 0
    return 0, each * number * QUERY_ROWS


def trainer_moments(shape: ModelShape, step: Step) -> list[Moment]:
    """Return every moment of an optimizer update that can be the peak."""
    c, s, tensor, frozen = step.computed, step.parameter_ranks, step.mesh.tensor, shape.is_frozen
    made = {layer: Activations(shape, layer, step) for layer in dict.fromkeys(shape.layers)}
    activations = [made[layer] for layer in shape.layers]
    cut = 1 if frozen else tensor  # adapters are hardly cut
    own_layers = [(layer.trained if frozen else layer.params_of(step.mesh.expert)) / cut for layer in shape.layers]
    resting_layers = [layer.trained / cut for layer in shape.layers]  # before they are shared: experts are in part
    layers = [layer.params_of(step.mesh.expert) / tensor for layer in shape.layers]
    root, own_root = shape.root_params / tensor, shape.trained_root_params / tensor
    weights = FLOAT32 * shape.num_params / tensor
    if frozen:
        weights = c * shape.num_params / tensor + FLOAT32 * sum(own_layers)
        layers = [layer + own for layer, own in zip(layers, own_layers, strict=True)]
    own = sum(resting_layers) + own_root
    table = shape.vocab * shape.hidden / tensor if own_root else 0
    on_device = 0 if step.on_gpu and step.train.cpu_offload else 1
    optimizer = on_device * 8 * own / s
    rests_on_host = step.on_gpu and step.train.offload_optimizer
    weights += step.copies * FLOAT32 * own
    heads = sum(one.num_bytes * (one.own_ids or shape.vocab) * one.width for one in step.teachers) / tensor
    resting = {"weights": (on_device * weights + heads) / s, "optimizer": 0 if rests_on_host else optimizer}
    reduced = on_device * FLOAT32 / s  # bytes of a reduced gradient's element
    head_output = FLOAT32 * (step.tokens / step.mesh.context) * HEAD_OUTPUTS * step.micro_batches
    waiting = FLOAT32 * (sum(own_layers) + own_root) if step.micro_batches > 1 else 0
    moments = []

    def fetched(index: int) -> float:
        """Return the bytes of the layer that is gathered ahead: one flat buffer beside what is copied out of it."""
        return c * layers[index] if s > 1 and index >= 0 else 0

    def add(name: str, *, loss: float = head_output, **parts: float) -> None:
        parts = resting | {"loss": loss} | parts
        moments.append(Moment(name, {part: round(parts.get(part, 0)) for part in PARTS}))

    kept = sum(one.kept for one in activations) + activations[-1].last_norm
    loss = _loss_bytes(shape, step) + head_output
    add("the loss", gradients=waiting, gathered=c * root + fetched(len(layers) - 1), activations=kept, loss=loss)
    for index in reversed(range(len(layers))):
        layer, own_layer, active = layers[index], own_layers[index], activations[index]
        done, at_rest = sum(own_layers[index + 1 :]), sum(resting_layers[index + 1 :])
        last = FLOAT32 * own_layers[index + 1] if index + 1 < len(layers) else 0  # the last reduction's input
        held = (waiting - FLOAT32 * done if waiting else 0) + at_rest * reduced + last
        reducing = _reducing(own_layer, step) + held - last
        mlp_matrix = c * shape.layers[index].mlp_matrix_of(step.mesh.expert) / tensor if own_layer else 0
        gathered = c * (root + layer) + fetched(index - 1)
        kept = sum(one.kept for one in activations[:index])
        below_mlp = kept + active.mlp_input
        for name, gradients, shards, used in (
            ("a layer's backward", held + mlp_matrix, gathered, kept + active.at_work),
            ("a layer's backward", held + c * own_layer, gathered, below_mlp),
            ("a layer's reduction", reducing, gathered - c * layer, below_mlp),
        ):
            add(name, gradients=gradients, gathered=shards, activations=used, loss=c * table + head_output)
    held = sum(resting_layers) * reduced + (FLOAT32 * own_root if waiting else 0)
    add("the embedding's backward", gradients=held + FLOAT32 * own_layers[0] + 2 * c * table, gathered=c * root)
    add("the root's reduction", gradients=held + _reducing(own_root, step))
    if on_device:
        largest = max(layer.mlp_matrix for layer in shape.layers)
        scratch = FLOAT32 * own / s if step.on_gpu else 2 * FLOAT32 * max(table, largest) / s
        add("the optimizer's step", gradients=FLOAT32 * own / s + scratch, optimizer=optimizer)
    return moments


def _reducing(elements: float, step: Step) -> float:
    """Return the bytes while gradients are summed over ranks: whole ones, their float32 copy, and the sum."""
    s = step.parameter_ranks
    return elements * (3 * FLOAT32 if s == 1 else max(step.computed + FLOAT32, FLOAT32 + FLOAT32 / s))


def _loss_bytes(shape: ModelShape, step: Step) -> float:
    """Return the greatest memory of `linear_divergence`, of which the weight's gradient outlives it."""
    tokens, vocab = math.ceil(step.tokens / step.mesh.context), shape.vocab // step.mesh.tensor
    matrix, hidden = vocab * shape.hidden, tokens * shape.hidden
    chunk = chunk_size(vocab, shape.hidden, num_tokens=tokens)
    parts: list[float] = [
        FLOAT32 * matrix if shape.trained_root_params else 0,
        2 * FLOAT32 * chunk * vocab,
        2 * step.computed * hidden,  # the rows that have a loss, and their gradient
        TOPK_BYTES * chunk * step.topk,
    ]
    if shape.has_soft_cap:
        parts.append(FLOAT32 * chunk * vocab)
    if step.teachers:  # all heads, where they are not whole already; of the largest its logits, its hidden states twice
        rows = [(one.own_ids or shape.vocab) // step.mesh.tensor for one in step.teachers]
        (width, size, _), number = max(zip(step.teachers, rows, strict=True), key=lambda pair: pair[0].width)
        heads = [each.num_bytes * own * each.width for each, own in zip(step.teachers, rows, strict=True)]
        gathered = sum(heads) if step.parameter_ranks > 1 else 0
        converted = FLOAT32 * width * (number + tokens) if size < FLOAT32 and not step.on_gpu else 0
        blocks = BLOCKS * FLOAT32 * BLOCK_ELEMENTS if not step.topk and not step.on_gpu else 0
        logits = [FLOAT32 * chunk * vocab + blocks]
        for one, ids in zip(step.teachers, rows, strict=True):
            if one.own_ids is not None:  # `own_logits` has them over the teacher's ids, then over all of the student's
                logits.append(FLOAT32 * chunk * max(2 * ids + shape.vocab, ids + 2 * shape.vocab))
        parts += [max(logits), 2 * size * tokens * width, gathered, converted]
    if step.computed < FLOAT32:
        parts.append(step.computed * chunk * vocab if step.on_gpu else FLOAT32 * (matrix + hidden))
    return sum(parts)
