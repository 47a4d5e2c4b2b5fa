"""What the trainer holds at each moment of an optimizer step; the arithmetic stands at the top of the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from distill_cli.config.derived import micro_batches_per_update
from distill_cli.config.schema import Checkpointing, Config, Precision
from distill_cli.memory.shape import ModelShape

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
HEAD_BUFFER_BYTES = 2**26
"""`losses.linear_topk.MIN_BUFFER_BYTES`."""
TOPK_BYTES = 45
"""Of the fused head's small tensors, for each token of a chunk and word of its top-k (measured)."""
FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """An optimizer step, as far as a rank's memory depends on it."""

    tokens: int
    """Of a packed row at most; context ranks share it."""
    topk: int
    micro_batches: int = 1
    """Of a rank."""
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
        return self.shard * self.context


@dataclass(frozen=True)
class Moment:
    """What the trainer holds at one moment of a step: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Activations:
    """Bytes that one layer keeps for the backward pass on one rank, read off what transformers' layers save."""

    shape: ModelShape
    step: Step

    @cached_property
    def tokens(self) -> float:
        """Of this rank, in attention and MLP."""
        return self.step.tokens / self.step.context

    @cached_property
    def hidden(self) -> float:
        """Elements of the hidden states between layers."""
        return self.tokens * self.shape.hidden / (self.step.tensor if self.step.sequence_parallel else 1)

    @cached_property
    def whole_hidden(self) -> float:
        """Elements of what enters attention and MLP."""
        return self.tokens * self.shape.hidden

    @cached_property
    def query(self) -> float:
        return self.tokens * self.shape.query / self.step.tensor

    @cached_property
    def key(self) -> float:
        return self.tokens * self.shape.key / self.step.tensor

    @cached_property
    def mlp(self) -> float:
        return self.tokens * self.shape.mlp / self.step.tensor

    def norm(self, elements: float) -> float:
        """The float32 input, and the normalised one for the weight's gradient. What comes out is counted where it is
        kept."""
        if self.shape.adapter_params is not None:
            return elements * FLOAT32
        return elements * (FLOAT32 + (FLOAT32 if self.shape.float32_norms else self.step.computed))

    @cached_property
    def everything(self) -> float:
        """Of a layer without checkpointing."""
        c, shape = self.step.computed, self.shape
        norms = shape.num_norms * self.norm(self.hidden) + 2 * c * self.whole_hidden
        head_norms = self.norm(self.query + self.key) if shape.has_head_norms else 0
        attention = c * (3 * self.query + 2 * self.step.context * self.key)  # queries, output twice; whole keys, values
        return norms + head_norms + attention + c * 4 * self.mlp

    @cached_property
    def kept(self) -> float:
        """Of a layer after its forward pass."""
        c = self.step.computed
        match self.step.checkpointing:
            case Checkpointing.none:
                return self.everything
            case Checkpointing.full:
                return c * self.hidden
            case Checkpointing.selective:
                products = self.query + 2 * self.key + 2 * self.mlp + 2 * self.whole_hidden
                return c * (self.hidden + products + self.query)

    @cached_property
    def at_work(self) -> float:
        """Of the layer whose backward pass is at its MLP: everything, and three gradients."""
        c = self.step.computed
        own_input = c * self.hidden if self.step.bf16 and self.step.checkpointing is not Checkpointing.none else 0
        return self.everything + own_input + c * (self.whole_hidden + 2 * self.mlp)

    @cached_property
    def last_norm(self) -> float:
        return self.norm(self.hidden) + self.step.computed * self.whole_hidden


def trainer_moments(shape: ModelShape, step: Step) -> list[Moment]:
    """Every moment of an optimizer step that can be the peak."""
    c, s, activations = step.computed, step.parameter_ranks, Activations(shape, step)
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
    resting = {
        "weights": on_device * weights / s,
        "optimizer": 0 if step.offload_optimizer else optimizer,
    }
    reduced = on_device * FLOAT32 / s  # bytes of a gradient that is done
    fetched = c * layer if s > 1 else 0  # as one flat buffer, beside the parameters that are copied out of it
    said = FLOAT32 * activations.tokens * (step.topk + 6) * step.micro_batches
    loss, left = _loss_bytes(shape, step) + said, c * table + said
    waiting = FLOAT32 * own if step.micro_batches > 1 else 0
    moments = []

    def add(name: str, **parts: float) -> None:
        parts = resting | parts
        moments.append(Moment(name, {part: round(parts.get(part, 0)) for part in PARTS}))

    add(
        "the loss",
        gradients=waiting,
        gathered=c * root + fetched,
        activations=shape.num_layers * activations.kept + activations.last_norm,
        loss=loss,
    )
    for done in range(shape.num_layers):
        above = shape.num_layers - 1 - done  # layers whose backward pass is to come
        held = waiting - FLOAT32 * done * own_layer if waiting else 0
        held += done * own_layer * reduced + (FLOAT32 * own_layer if done else 0)  # the last reduction's input
        gathered = c * (root + layer) + (fetched if above else 0)
        mlp_matrix = c * shape.mlp * shape.hidden / step.tensor if own_layer else 0
        kept = above * activations.kept
        add(
            "a layer's backward",
            gradients=held + mlp_matrix,
            gathered=gathered,
            activations=kept + activations.at_work,
            loss=left,
        )
        kept += c * activations.whole_hidden
        add("a layer's backward", gradients=held + c * own_layer, gathered=gathered, activations=kept, loss=left)
        reducing = _reducing(own_layer, step) + held - (FLOAT32 * own_layer if done else 0)
        add("a layer's reduction", gradients=reducing, gathered=gathered - c * layer, activations=kept, loss=left)
    done = shape.num_layers * own_layer * reduced
    waiting = FLOAT32 * own_root if waiting else 0
    last_input = FLOAT32 * own_layer
    add("the embedding's backward", gradients=done + waiting + last_input + 2 * c * table, gathered=c * root, loss=said)
    add("the root's reduction", gradients=done + waiting + _reducing(own_root, step), loss=said)
    if not step.cpu_offload:
        scratch = FLOAT32 * own / s if step.on_gpu else 2 * FLOAT32 * max(table, shape.mlp * shape.hidden) / s
        gradients = FLOAT32 * own / s + scratch
        add("the optimizer's step", gradients=gradients, optimizer=optimizer, loss=said)
    return moments


def _reducing(elements: float, step: Step) -> float:
    """Bytes while gradients are summed over ranks: whole ones, their float32 copy, and what comes out of it."""
    if step.parameter_ranks == 1:
        return 3 * FLOAT32 * elements
    return elements * max(step.computed + FLOAT32, FLOAT32 + FLOAT32 / step.parameter_ranks)


def _loss_bytes(shape: ModelShape, step: Step) -> float:
    """What `linear_topk_loss` holds at its most, of which the weight's gradient outlives it."""
    tokens, vocab = math.ceil(step.tokens / step.context), shape.vocab // step.tensor
    matrix, hidden = vocab * shape.hidden, tokens * shape.hidden
    chunk = head_chunk(vocab, shape.hidden, num_tokens=tokens)
    parts = [
        FLOAT32 * matrix if shape.trained_root_params else 0,
        2 * FLOAT32 * chunk * vocab,
        2 * step.computed * hidden,  # the rows that have a loss, and their gradient
        TOPK_BYTES * chunk * step.topk,
    ]
    if step.bf16:
        parts.append(step.computed * chunk * vocab if step.on_gpu else FLOAT32 * (matrix + hidden))
    return sum(parts)


def head_chunk(vocab: int, hidden: int, *, num_tokens: int) -> int:
    """Tokens that the fused head takes at a time, as `losses.linear_topk` does."""
    most = max(hidden // 2, HEAD_BUFFER_BYTES // (2 * FLOAT32 * vocab), 1)
    return math.ceil(num_tokens / math.ceil(num_tokens / most))
