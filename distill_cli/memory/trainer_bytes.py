"""Memory of the trainer at each moment of an optimizer update; the package's docstring explains the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill_cli.config.derived import micro_batches_per_update
from distill_cli.config.schema import Checkpointing, Config, Precision
from distill_cli.memory.shape import ModelShape

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
HEAD_BUFFER_BYTES = 2**26
"""`losses.linear_topk.MIN_BUFFER_BYTES`."""
TOPK_BYTES = 45
"""Bytes of the fused head's small tensors per token of a chunk and token of its top-k (measured)."""
FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """An optimizer update, as far as a rank's memory depends on it."""

    tokens: int
    """Tokens of a packed row, at most; context ranks share it."""
    topk: int
    micro_batches: int = 1
    """Micro-batches of a rank per update."""
    bf16: bool = False
    checkpointing: Checkpointing = Checkpointing.none
    shard: int = 1
    context: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    on_gpu: bool = False
    cpu_offload: bool = False
    offload_optimizer: bool = False

    @classmethod
    def of(cls, config: Config, *, num_ranks: int, on_gpu: bool) -> Step:
        """Return the update of a config, with sequences of the greatest length."""
        train, mesh = config.train, config.mesh
        copies = num_ranks // (mesh.tensor * mesh.context)
        sequences = math.ceil(train.global_batch_size / copies)
        return cls(
            tokens=min(train.micro_batch_tokens, sequences * config.rollout.max_sequence_length),
            topk=config.loss.topk,
            micro_batches=micro_batches_per_update(config, num_ranks=num_ranks),
            bf16=train.precision is Precision.bf16,
            checkpointing=train.activation_checkpointing,
            shard=max(copies // mesh.replicate, 1),
            context=mesh.context,
            tensor=mesh.tensor,
            sequence_parallel=mesh.sequence_parallel,
            on_gpu=on_gpu,
            cpu_offload=train.cpu_offload and on_gpu,
            offload_optimizer=train.offload_optimizer and on_gpu,
        )

    @property
    def computed(self) -> int:
        """Bytes of a computed element."""
        return 2 if self.bf16 else FLOAT32

    @property
    def parameter_ranks(self) -> int:
        """Ranks that share the parameters."""
        return self.shard * self.context


@dataclass(frozen=True)
class Moment:
    """The trainer's memory at one moment of an update: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass on one rank, derived from what transformers' layers save."""

    kept: float
    """A layer after its forward pass."""
    at_work: float
    """The layer whose backward pass is at its MLP: everything, and three gradients."""
    last_norm: float
    mlp_input: float
    """What enters attention and MLP, whole on each rank."""

    @classmethod
    def of(cls, shape: ModelShape, step: Step) -> Activations:
        c, tokens = step.computed, step.tokens / step.context
        hidden = tokens * shape.hidden / (step.tensor if step.sequence_parallel else 1)  # elements between layers
        whole_hidden = tokens * shape.hidden
        query, key, mlp = (tokens * width / step.tensor for width in (shape.query, shape.key, shape.mlp))

        def norm(elements: float) -> float:
            """Bytes of the float32 input, and of the normalised one for the weight's gradient."""
            if shape.adapter_params is not None:
                return elements * FLOAT32
            return elements * (FLOAT32 + (FLOAT32 if shape.float32_norms else c))

        norms = shape.num_norms * norm(hidden) + 2 * c * whole_hidden
        head_norms = norm(query + key) if shape.has_head_norms else 0
        attention = c * (3 * query + 2 * step.context * key)  # queries, output twice; whole keys, values
        everything = norms + head_norms + attention + c * 4 * mlp
        match step.checkpointing:
            case Checkpointing.none:
                kept = everything
            case Checkpointing.full:
                kept = c * hidden
            case Checkpointing.selective:
                products = query + 2 * key + 2 * mlp + 2 * whole_hidden
                kept = c * (hidden + products + query)
        own_input = c * hidden if step.bf16 and step.checkpointing is not Checkpointing.none else 0
        at_work = everything + own_input + c * (whole_hidden + 2 * mlp)
        return cls(kept, at_work, last_norm=norm(hidden) + c * whole_hidden, mlp_input=c * whole_hidden)


def trainer_moments(shape: ModelShape, step: Step) -> list[Moment]:
    """Return every moment of an optimizer update that can be the peak."""
    c, s, activations = step.computed, step.parameter_ranks, Activations.of(shape, step)
    layer, root = shape.layer_params / step.tensor, shape.root_params / step.tensor
    frozen = shape.adapter_params is not None
    own_layer = shape.trained_layer_params / (1 if frozen else step.tensor)  # adapters are hardly cut
    own_root = shape.trained_root_params / step.tensor
    weights = FLOAT32 * shape.num_params / step.tensor
    if frozen:
        weights = c * shape.num_params / step.tensor + FLOAT32 * shape.num_layers * own_layer
        layer += own_layer
    own = shape.num_layers * own_layer + own_root
    table = shape.vocab * shape.hidden / step.tensor if own_root else 0
    on_device = 0 if step.cpu_offload else 1
    optimizer = on_device * 8 * own / s
    resting = {"weights": on_device * weights / s, "optimizer": 0 if step.offload_optimizer else optimizer}
    reduced = on_device * FLOAT32 / s  # bytes of a reduced gradient's element
    fetched = c * layer if s > 1 else 0  # one flat buffer, in addition to the parameters copied out of it
    head_output = FLOAT32 * (step.tokens / step.context) * (step.topk + 6) * step.micro_batches
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
        mlp_matrix = c * shape.mlp * shape.hidden / step.tensor if own_layer else 0
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
    if not step.cpu_offload:
        scratch = FLOAT32 * own / s if step.on_gpu else 2 * FLOAT32 * max(table, shape.mlp * shape.hidden) / s
        add("the optimizer's step", gradients=FLOAT32 * own / s + scratch, optimizer=optimizer)
    return moments


def _reducing(elements: float, step: Step) -> float:
    """Return the bytes while gradients are summed over ranks: whole ones, their float32 copy, and the sum."""
    s = step.parameter_ranks
    return elements * (3 * FLOAT32 if s == 1 else max(step.computed + FLOAT32, FLOAT32 + FLOAT32 / s))


def _loss_bytes(shape: ModelShape, step: Step) -> float:
    """Return the greatest memory of `linear_topk_loss`, of which the weight's gradient outlives it."""
    tokens, vocab = math.ceil(step.tokens / step.context), shape.vocab // step.tensor
    matrix, hidden = vocab * shape.hidden, tokens * shape.hidden
    chunk = head_chunk(vocab, shape.hidden, num_tokens=tokens)
    parts: list[float] = [
        FLOAT32 * matrix if shape.trained_root_params else 0,
        2 * FLOAT32 * chunk * vocab,
        2 * step.computed * hidden,  # the rows that have a loss, and their gradient
        TOPK_BYTES * chunk * step.topk,
    ]
    if step.bf16:
        parts.append(step.computed * chunk * vocab if step.on_gpu else FLOAT32 * (matrix + hidden))
    return sum(parts)


def head_chunk(vocab: int, hidden: int, *, num_tokens: int) -> int:
    """Return the tokens that the fused head processes at a time, as `losses.linear_topk` does."""
    most = max(hidden // 2, HEAD_BUFFER_BYTES // (2 * FLOAT32 * vocab), 1)
    return math.ceil(num_tokens / math.ceil(num_tokens / most))
