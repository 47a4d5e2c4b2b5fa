"""What a rank will hold in memory, predicted from the models' config.json and safetensors headers. No torch.

The trainer's peak is the largest of the moments of an optimizer step, each a sum of parts (`trainer_moments`). With c
bytes to a computed element (2 in bf16, 4 in fp32), s ranks that share the parameters (shard x context) and P parameters
of this rank's tensor-parallel share, of them P_layer in a layer and P_root in embedding, last norm and head:

- weights: 4 P / s.
- optimizer: AdamW's two moments, 8 P / s. With `train.offload_optimizer` only inside its own step, on GPUs.
- gradients: 4 P / s as layers are done; besides, whole ones of the layer at work, and the float32 copy that is reduced.
  Where several micro-batches make an optimizer step 4 P more: FSDP reduces the last one's, with the sum of the others.
- gathered: c P_root from the forward pass into the end of the backward pass, c P_layer of the layer at work, and as
  much of the one that is fetched meanwhile. One rank alone gathers too: its computed copies.
- activations: what `train.activation_checkpointing` keeps of every layer, and in the backward pass one layer whole.
- loss: the head's weight gradient in float32, the chunks' buffers, and what the head says of each token.

`train.cpu_offload` takes weights, optimizer and reduced gradients off a GPU. Lengths are taken at their most: rows as
full as `train.micro_batch_tokens` and the global batch allow, every token of them a response. Padding to length buckets
may add a quarter to a sequence that is longer than a micro-batch; `train.compile` keeps less than is said here. Left
out is what no key changes: libraries, the CUDA context, communication buffers, fragmentation.

An engine holds on a GPU `gpu_memory_utilization` of it, or its weights and `kv_cache_gib` where that is given; on a CPU
its weights and its KV cache. Engines that stay awake add to the trainer's peak. A rank's peak is the larger of

    trainer's peak + engines that do not sleep        (it trains)
    weights + optimizer + all engines                 (they sample and score)
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_cli import modelpath
from distill_cli.config.derived import micro_batches_per_update
from distill_cli.config.schema import Checkpointing, Config, Dtype, EngineModelConfig, Precision

FAMILIES = {"qwen2", "qwen3", "llama", "mistral", "gemma3_text"}
"""`model_type` of the dense decoders whose layers are known here."""
PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
DTYPE_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}
QUANTIZED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.5}
"""Bytes to a parameter of a layer that vLLM quantizes while it loads; other methods need a quantized checkpoint."""
CPU_KV_CACHE_GIB = 0.25
"""`engines.settings.CPU_KV_CACHE_BYTES`."""
HEAD_BUFFER_BYTES = 2**26
"""`losses.linear_topk.MIN_BUFFER_BYTES`."""
TOPK_BYTES = 45
"""Of the fused head's small tensors, for each token of a chunk and word of its top-k (measured)."""
FLOAT32 = 4


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
        return self.layer_params

    @property
    def trained_root_params(self) -> int:
        return self.root_params

    @property
    def trained_params(self) -> int:
        return self.num_layers * self.trained_layer_params + self.trained_root_params


def read_shape(folder: Path) -> ModelShape:
    """Raises NoPrediction."""
    config = modelpath.read_config(folder)
    return shape_of(config, {name: shape for name, (_, shape) in modelpath.tensors(folder).items()})


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
        """The float32 input and the normalised one. What comes out is counted where it is kept."""
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
    own_layer, own_root = shape.trained_layer_params / step.tensor, shape.trained_root_params / step.tensor
    own = shape.num_layers * own_layer + own_root
    table = shape.vocab * shape.hidden / step.tensor if own_root else 0
    on_device = 0 if step.cpu_offload else 1
    optimizer = on_device * 8 * own / s
    resting = {
        "weights": on_device * FLOAT32 * shape.num_params / step.tensor / s,
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


@dataclass(frozen=True)
class Device:
    """What the ranks of a node live on."""

    total: int
    """Bytes: of one GPU, or of the host."""
    is_gpu: bool


@dataclass(frozen=True)
class Prediction:
    """One rank of a run, in bytes."""

    trainer: Moment
    """The moment that holds most."""
    engines: dict[str, int]
    """sampler, scorer: while awake. On a GPU of unknown size without those that take a share of it."""
    resting: int
    """What the trainer holds while the engines work."""
    asleep: tuple[str, ...] = ()
    """The engines that give their memory back while the student trains."""

    @property
    def peak(self) -> int:
        awake = sum(size for name, size in self.engines.items() if name not in self.asleep)
        turns = max((self.engines[name] for name in self.asleep), default=0)  # one of them at a time
        return max(self.trainer.total + awake, self.resting + awake + turns)

    def __str__(self) -> str:
        parts = {**self.trainer.parts, **self.engines}
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size) + " GiB"


def predict(
    config: Config, shape: ModelShape, student: Path, teacher: Path, *, num_ranks: int, gpu_bytes: int | None = None
) -> Prediction:
    """Of a rank on a GPU of `gpu_bytes` (0 where its size is not known), or on a CPU where that is None.

    Raises NoPrediction.
    """
    on_gpu = gpu_bytes is not None
    moments = trainer_moments(shape, Step.of(config, num_ranks=num_ranks, on_gpu=on_gpu))
    engines = {
        "sampler": engine_bytes(
            student,
            config.model.student.dtype,
            None,
            config.engine.student,
            tensor_parallel=config.engine.student.tensor_parallel,
            gpu_bytes=gpu_bytes,
        ),
        "scorer": engine_bytes(
            teacher,
            config.model.teacher.dtype,
            config.model.teacher.quantization,
            config.engine.teacher,
            tensor_parallel=config.engine.teacher.tensor_parallel,
            gpu_bytes=gpu_bytes,
        ),
    }
    before = moments[0].parts
    roles = {"sampler": config.engine.student.sleep, "scorer": config.engine.teacher.sleep}
    asleep = tuple(name for name, sleeps in roles.items() if gpu_bytes is not None and sleeps is not False)
    return Prediction(
        asleep=asleep,
        trainer=max(moments, key=lambda moment: moment.total),
        engines=engines,
        resting=before["weights"] + before["optimizer"],
    )


def engine_bytes(
    folder: Path,
    dtype: Dtype,
    quantization: str | None,
    engine: EngineModelConfig,
    *,
    tensor_parallel: int,
    gpu_bytes: int | None,
) -> int:
    """Of an engine that is awake. Raises NoPrediction."""
    if gpu_bytes is not None and engine.kv_cache_gib is None:
        return round(engine.gpu_memory_utilization * gpu_bytes)
    kv_cache = CPU_KV_CACHE_GIB if engine.kv_cache_gib is None else engine.kv_cache_gib
    weights = engine_weights(folder, dtype, quantization, tensor_parallel=tensor_parallel)
    return weights + round(kv_cache * 2**30)


def engine_weights(folder: Path, dtype: Dtype, quantization: str | None, *, tensor_parallel: int) -> int:
    """Bytes of an engine's weights: those of the files where they are quantized. Raises NoPrediction."""
    tensors = modelpath.tensors(folder)
    if "quantization_config" in modelpath.read_config(folder):
        sizes = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
        unknown = {dtype for dtype, _ in tensors.values()} - sizes.keys()
        if unknown:
            raise NoPrediction(f"its files have tensors of type {', '.join(sorted(unknown))}")
        return round(sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values()) / tensor_parallel)
    if quantization is not None and quantization not in QUANTIZED_BYTES:
        raise NoPrediction(f"how small {quantization} makes its weights is not known")
    plain = DTYPE_BYTES[dtype]
    in_layers = QUANTIZED_BYTES.get(quantization, plain)
    total = sum(
        math.prod(shape) * (in_layers if ".layers." in name and len(shape) == 2 else plain)
        for name, (_, shape) in tensors.items()
    )
    return round(total / tensor_parallel)


def alternatives(
    config: Config, shape: ModelShape, *, num_ranks: int, gpu_bytes: int | None, excess: int
) -> Iterator[tuple[str, Config]]:
    """Single keys that may lower a rank's peak, as typed, and the config with each."""

    def changed(key: str, value: Any) -> tuple[str, Config]:
        other = copy.deepcopy(config)
        *path, name = key.split(".")
        target = other
        for part in path:
            target = getattr(target, part)
        setattr(target, name, value)
        shown = value.value if isinstance(value, Enum) else str(value).lower()
        return f"{key}={shown}", other

    tokens = config.train.micro_batch_tokens // 2
    while tokens >= config.rollout.max_sequence_length:
        yield changed("train.micro_batch_tokens", tokens)
        tokens //= 2
    modes = [Checkpointing.none, Checkpointing.selective, Checkpointing.full]
    for mode in modes[modes.index(config.train.activation_checkpointing) + 1 :]:
        yield changed("train.activation_checkpointing", mode)
    mesh = config.mesh
    for name in ("tensor", "context"):
        for size in range(getattr(mesh, name) + 1, num_ranks + 1):
            others = mesh.replicate * mesh.tensor * mesh.context // getattr(mesh, name)
            cut = (shape.num_heads, shape.num_key_heads, shape.mlp, shape.vocab) if name == "tensor" else ()
            refused = name == "tensor" and config.train.compile
            if num_ranks % (others * size) == 0 and not any(number % size for number in cut) and not refused:
                yield changed(f"mesh.{name}", size)
    if mesh.replicate > 1:
        yield changed("mesh.replicate", 1)
    for role in ("student", "teacher"):
        kv_cache = getattr(config.engine, role).kv_cache_gib
        less = math.floor(1000 * ((kv_cache or CPU_KV_CACHE_GIB) - excess / 2**30)) / 1000
        if less > 0 and (kv_cache is not None or gpu_bytes is None):
            yield changed(f"engine.{role}.kv_cache_gib", less)
    if gpu_bytes is None:
        return
    if not config.train.cpu_offload and not config.train.offload_optimizer:
        yield changed("train.offload_optimizer", True)
        yield changed("train.cpu_offload", True)
    for role in ("student", "teacher"):
        engine = getattr(config.engine, role)
        if engine.kv_cache_gib is None and gpu_bytes:
            share = math.floor((engine.gpu_memory_utilization - excess / gpu_bytes) * 100) / 100
            if share > 0:
                yield changed(f"engine.{role}.gpu_memory_utilization", share)


def problem(
    config: Config, shape: ModelShape, student: Path, teacher: Path, *, num_ranks: int, ranks_here: int, device: Device
) -> str | None:
    """One line where a rank's peak does not fit, with the keys that alone bring it under; None where it does.

    Raises NoPrediction.
    """
    gpu_bytes = device.total if device.is_gpu else None
    room = device.total if device.is_gpu else device.total // ranks_here

    def predicted(other: Config) -> Prediction:
        return predict(other, shape, student, teacher, num_ranks=num_ranks, gpu_bytes=gpu_bytes)

    now = predicted(config)
    if now.peak <= room:
        return None
    excess = now.peak - room
    best: dict[str, tuple[int, str]] = {}
    for typed, other in alternatives(config, shape, num_ranks=num_ranks, gpu_bytes=gpu_bytes, excess=excess):
        key, peak = typed.split("=")[0], predicted(other).peak
        if peak <= room and key not in best and _engines_fit(other, student, teacher, gpu_bytes):
            best[key] = (peak, f"{typed} ({gib(peak)} GiB)")
    where = "its GPU has" if device.is_gpu else f"its share of the host's memory ({ranks_here} ranks) is"
    turn = " or ".join(text for _, text in sorted(best.values())[:3])
    return f"memory: a rank needs about {gib(now.peak)} GiB ({now}), and {where} {gib(room)} GiB; " + (
        f"set {turn}" if turn else "no single key brings it under: a smaller model, more ranks, or several of them"
    )


def engine_problems(config: Config, student: Path, teacher: Path, *, gpu_bytes: int) -> Iterator[str]:
    """One line for each engine whose weights alone pass its share of the GPU. Raises NoPrediction."""
    for role, folder, model, engine in (
        ("student", student, config.model.student, config.engine.student),
        ("teacher", teacher, config.model.teacher, config.engine.teacher),
    ):
        if engine.kv_cache_gib is not None:
            continue
        weights = engine_weights(
            folder, model.dtype, getattr(model, "quantization", None), tensor_parallel=engine.tensor_parallel
        )
        if weights >= engine.gpu_memory_utilization * gpu_bytes:
            yield (
                f"engine.{role}.gpu_memory_utilization={engine.gpu_memory_utilization}: the engine's weights are "
                f"{gib(weights)} GiB, and that share of the GPU is {gib(engine.gpu_memory_utilization * gpu_bytes)} "
                f"GiB; raise it above {math.ceil(100 * weights / gpu_bytes) / 100}"
            )


def _engines_fit(config: Config, student: Path, teacher: Path, gpu_bytes: int | None) -> bool:
    return gpu_bytes is None or not list(engine_problems(config, student, teacher, gpu_bytes=gpu_bytes))


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.2f}"
