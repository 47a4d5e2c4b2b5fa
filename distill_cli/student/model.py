"""The student: a transformers causal LM with the fused head in place of its logits, wrapped for the mesh.

The order of wrapping is the order of the lines of `wrap`. Parameters are float32; with bf16 the student computes in
bfloat16 and reduces gradients in float32.

Shape letters: T tokens of the packed row, N response tokens, n of a chunk, C the top-k and the rest, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from distill_cli.errors import ConfigError
from distill_cli.losses.groups import TokenGroups
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, join, linear_divergence
from distill_cli.losses.objective import BatchLoss, Facts, Objective, calls_of
from distill_cli.losses.scored_teacher import ScoredHead, scored_teacher
from distill_cli.losses.teacher_chunk import TeacherHidden, TopK
from distill_cli.machine.torch_versions import varlen_operator
from distill_cli.models.known_families import HEADS
from distill_cli.models.traits import Traits
from distill_cli.parallel.expert import apply_expert_parallel, experts_of
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.tensor import apply_tensor_parallel, gather_hidden
from distill_cli.rollout.pack import MicroBatch
from distill_cli.student import attention
from distill_cli.student.adapters import rank_of
from distill_cli.student.decoder import decoder_of, drop_other_modules, layers_of, measure_transform
from distill_cli.student.published import Published
from distill_cli.student.router_loss import RouterLoss
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.student.weights import empty_parameters
from distill_cli.types import TeacherScores

Checkpointing = Literal["none", "selective", "full"]

KEPT = {
    *(torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten._flash_attention_forward),
    *(torch.ops.aten._scaled_dot_product_flash_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu),
    varlen_operator(),  # `attention` on GPUs: one opaque operator
}
"""Operators whose outputs selective checkpointing keeps: the most expensive ones to recompute."""
SMALL_BYTES = 2**22
"""A student of up to this size is gathered whole: each further collective takes longer than the layers around it."""


class Student(nn.Module):
    """The root that FSDP2 wraps: tokens in, the micro-batch's share of the loss out.

    The head's weight is used inside this forward, so that FSDP's hooks gather it before and reduce its gradient after.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        objective: Objective,
        own_objectives: Mapping[int, Objective] | None = None,
        has_advantages: bool = False,
        parallel: Parallel | None = None,
        merged_eos_ids: Sequence[int] = (),
        published: Published | None = None,
        router_aux_loss: float = 0.0,
    ) -> None:
        """
        Args:
            objective: of all tokens but those of `own_objectives`.
            own_objectives: by set of teachers (`Prompt.teachers`), for those with a loss of their own.
            has_advantages: whether sampled tokens have advantages (`MicroBatch.advantages`).
            parallel: the mesh that `wrap` lays it out over; None is a student of one process, without a mesh.
            merged_eos_ids: tokens that count as one, as they do in the teacher's scores (`losses.merged_eos`).
            published: where its parameters lie in its checkpoint; None if it has none.
            router_aux_loss: weight of the family's own loss that balances its experts.
        """
        super().__init__()
        self.published = published
        self.lm = lm
        self.transform = measure_transform(lm)
        self.needs_rows = Traits.of(lm.config.to_dict()).needs_rows
        self.router_loss = RouterLoss.of(lm, weight=router_aux_loss) if router_aux_loss else None
        self.device = parallel.device if parallel else torch.device("cpu")
        self.tensor = parallel.tensor if parallel and parallel.tensor.size() > 1 else None
        self.sequence_parallel = bool(parallel and parallel.sequence_parallel)
        self.objective, self.has_advantages = objective, has_advantages
        self.own_objectives = dict(own_objectives or {})
        self.heads: TeacherHeads | None = None
        """The teachers' heads, if their hidden states are given."""
        self.groups: dict[int, TokenGroups] = {}
        """By index of the teachers with a tokenizer of their own."""
        self.merged_eos_ids = tuple(merged_eos_ids)

    @property
    def decoder(self) -> nn.Module:
        return decoder_of(self.lm)

    @property
    def objectives(self) -> list[Objective]:
        """All objectives of its tokens."""
        return [self.objective, *self.own_objectives.values()]

    @contextmanager
    def term_alone(self, term: Literal["divergence", "advantage"]) -> Iterator[None]:
        """Have within the block the loss's terms other than advantages, or advantages."""
        before = self.objective, self.own_objectives, self.has_advantages
        if term == "divergence":
            self.has_advantages = False
        else:
            off = partial(replace, divergence_weight=0.0, policy_gradient=0.0, likelihood=0.0)
            self.objective = off(self.objective)
            self.own_objectives = {key: off(one) for key, one in self.own_objectives.items()}
        try:
            yield
        finally:
            self.objective, self.own_objectives, self.has_advantages = before

    def forward(
        self, batch: MicroBatch, *, num_loss_tokens: torch.Tensor, num_top: int = 0, with_classes: bool = False
    ) -> tuple[torch.Tensor, HeadOutput]:
        """Return one micro-batch's share of the loss.

        Args:
            num_loss_tokens: scalar float; the response tokens of the whole global batch, over all ranks and
                micro-batches. The one division of the loss happens here.
            num_top, with_classes: further results of the head (`linear_divergence`).

        Returns:
            What to differentiate: the sum over this micro-batch's response tokens of their loss, divided by
            `num_loss_tokens` (scalar float32; sum it over micro-batches and ranks), and the router's loss, if it is
            on, times the micro-batch's share of `num_loss_tokens`. Then the head's output at each token, detached,
            whose loss is without the router's.
        """
        hidden_1TH, router_logits = self._hidden_states(batch)
        options: dict[str, Any] = {"num_top": num_top, "with_classes": with_classes}
        out = self._apply_head(hidden_1TH[0, batch.rows], batch, num_loss_tokens=num_loss_tokens, **options)
        if self.router_loss is None or not batch.num_response_tokens:
            return out.loss, out
        share = batch.num_response_tokens / num_loss_tokens
        return out.loss + share * self.router_loss(router_logits, batch.is_real), out

    def _apply_head(
        self, hidden_NH: torch.Tensor, batch: MicroBatch, *, num_loss_tokens: torch.Tensor, **options: Any
    ) -> HeadOutput:
        """Return the head's output at each response token, whose loss is divided by `num_loss_tokens`."""
        head, group = self._head(), None if self.tensor is None else self.tensor.get_group()
        hidden_NH = hidden_NH.to(head.weight_VH.dtype)  # Mamba's decoders return float32
        heads = {} if self.heads is None else self.heads.gather()  # by every rank, whatever its batch has
        position_N, length_N = batch.trained_places.unbind(-1)
        known = batch.teachers, batch.sampler_logp, batch.has_sampler_logp
        facts = Facts(*known, position_N, length_N, batch.advantages)
        from_hidden = batch.scores.hidden.shape[1] > 0

        def outputs(rows: torch.Tensor | slice, objective: Objective, teachers: int) -> HeadOutput:
            return linear_divergence(
                hidden_NH[rows],
                head,
                self._teacher(batch.scores.take(rows), objective, teachers, heads),
                BatchLoss(
                    self.own_objectives,
                    self.objective,
                    facts.take(rows),
                    num_loss_tokens=num_loss_tokens,
                    has_advantages=self.has_advantages,
                ),
                sampled_ids_N=batch.sampled_ids[rows],
                temperature=objective.temperature,
                group=group,
                merged_eos_ids=self.merged_eos_ids,
                **options,
            )

        is_apart = from_hidden or bool(self.groups)
        calls = calls_of(batch.teachers, self.own_objectives, self.objective, is_apart=is_apart)
        if len(calls) < 2:
            objective, (first, *_) = calls[0] if calls else (self.objective, [0])
            return outputs(slice(None), objective, first)
        rows = [torch.isin(batch.teachers, torch.tensor(sets).to(self.device)).nonzero()[:, 0] for _, sets in calls]
        return join([outputs(own, one, sets[0]) for own, (one, sets) in zip(rows, calls, strict=True)], rows)

    def limits_of(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clip and the greatest importance ratio at each response token: float [N] each."""
        clip_N = torch.full(batch.teachers.shape, self.objective.clip or torch.inf, device=batch.teachers.device)
        ratio_N = torch.full_like(clip_N, self.objective.max_ratio)
        for teachers, own in self.own_objectives.items():
            mine_N = batch.teachers == teachers
            clip_N[mine_N], ratio_N[mine_N] = own.clip or torch.inf, own.max_ratio
        return clip_N, ratio_N

    def _head(self) -> Head:
        """Return this rank's shard of the student's head, whose gradients are its own, and whole."""
        module = self.lm.get_output_embeddings()
        weight, bias = module.weight, getattr(module, "bias", None)
        if self.tensor is not None:
            weight = weight.to_local(grad_placements=[Shard(0)])
            bias = None if bias is None else bias.to_local(grad_placements=[Shard(0)])
        return Head(weight, bias, self.transform)

    def _teacher(
        self, scores: TeacherScores, objective: Objective, teachers: int, heads: Mapping[int, Head]
    ) -> TopK | TeacherHidden:
        """Return what is known of the teacher of some tokens, one of `teachers`."""
        index, head = max(teachers.bit_length() - 1, 0), None  # 0 of no tokens
        if scores.hidden.shape[1]:
            assert self.heads is not None
            head = ScoredHead(heads[index], self.heads.vocab_size, self.heads.own(index))
        size = self._head().weight_VH.shape[0] * (1 if self.tensor is None else self.tensor.size())
        return scored_teacher(scores, objective, groups=self.groups.get(index), head=head, student_size=size)

    def _hidden_states(self, batch: MicroBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the decoder's output for a micro-batch, its rows end to end, [1, T, H]; and its routers' logits."""
        documents = batch.documents
        assert documents.is_rows or not self.needs_rows, f"{', '.join(self.needs_rows)}: documents cannot be packed"
        inputs = {"input_ids": documents.batch(batch.input_ids), "position_ids": documents.batch(batch.position_ids)}
        # A mask that hides nothing: else transformers looks for documents in the positions, and finds other bounds.
        mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        options = {} if self.router_loss is None else {"output_router_logits": True}
        with attention.documents_of(documents):
            output = self.decoder(**inputs, attention_mask=mask, use_cache=False, **options)
        hidden = output.last_hidden_state
        if self.tensor is not None:
            hidden = gather_hidden(hidden, self.tensor, sequence_parallel=self.sequence_parallel)
        return hidden.reshape(1, -1, hidden.shape[-1]), output.router_logits if options else ()

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[MicroBatch], *, num_loss_tokens: torch.Tensor, **options: Any
    ) -> list[HeadOutput]:
        """Return the head's output for each micro-batch, its share of the loss included, without gradient.

        The arguments are `forward`'s. A collective: every rank must have as many micro-batches.
        """
        options["num_loss_tokens"] = num_loss_tokens
        outputs = [self(batch.to(self.device), **options)[1] for batch in batches]
        if isinstance(self, FSDPModule):
            self.reshard()  # no backward pass does; gathered parameters would outlive a change of the weights
        return outputs


def build_lm(folder: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Published]:
    """Build the folder's causal LM in float32 with the packed attention and empty parameters (see `load_weights`).

    Of a multimodal model the text model alone is built. It is in evaluation mode, as the sampler's is: no dropout, and
    no noise in its routers.

    Returns:
        The model, and where its parameters lie in the folder's files.

    Raises:
        ConfigError: the folder does not fit the model, or the family is not supported.
    """
    attention.register()
    disable_progress_bar()
    own_attention = Traits.read(folder).has_own_attention  # read rows of one document each, with a mask of its own
    options: dict[str, Any] = {"attn_implementation": "eager" if own_attention else attention.NAME}
    options["dtype"] = torch.float32
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with empty_parameters(), without_dropout(model_config):
            if (published_class := class_of(model_config)) is not None:
                lm = published_class._from_config(model_config, **options)
            else:
                lm = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a family's own code, on a config.json that may be damaged
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{folder}: transformers makes no model of its config.json ({why}); correct it") from error
    if lm.can_generate() and (folder / "generation_config.json").is_file():
        lm.generation_config = GenerationConfig.from_pretrained(folder)
    if lm.get_output_embeddings() is None:
        raise ConfigError(f"{folder}: {type(lm).__name__} has no head over its vocabulary; it is not a causal LM")
    published = Published(lm, folder)
    drop_other_modules(lm)
    published.keep(lm.state_dict())
    return lm.eval(), published


def class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of transformers that a checkpoint was published for; None if it is none with a head.

    A multimodal checkpoint's own class has the names of its tensors.
    """
    name = next(iter(config.architectures or ()), "")
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}) or not name.endswith(HEADS):
        return None
    return getattr(transformers, name, None)


@contextmanager
def without_dropout(config: PretrainedConfig) -> Iterator[None]:
    """Set the dropout rates of a config to 0 while models are built from it.

    Activation checkpointing needs layers in training mode, and some families drop there instead of in modules.
    """
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    found = [
        (part, name, value)
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, float) and value and "drop" in name
    ]
    for part, name, _ in found:
        setattr(part, name, 0.0)
    try:
        yield
    finally:
        for part, name, value in found:  # they are the model's, and saved with it
            setattr(part, name, value)


def wrap(
    student: Student,
    parallel: Parallel,
    *,
    bf16: bool,
    checkpointing: Checkpointing = "none",
    compile: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Lay the student out over the mesh, in place. Every rank must call it.

    Args:
        bf16: compute in bfloat16; else in float32.
        checkpointing: see `checkpoint_activations`.
        compile: compile each layer.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
    """
    apply_tensor_parallel(student.lm, parallel.tensor, sequence_parallel=parallel.sequence_parallel)
    apply_expert_parallel(student.lm, parallel.expert)
    checkpoint_activations(student.lm, checkpointing)
    if compile:
        for layer in layers_of(student.lm):
            layer.compile()
    shard(student, parallel, bf16=bf16, cpu_offload=cpu_offload)


def checkpoint_activations(lm: PreTrainedModel, which: Checkpointing) -> None:
    """Keep each layer's input (full), its input and the outputs of KEPT (selective), or everything (none)."""
    if which == "none":
        return
    arguments: dict[str, object] = {"use_reentrant": False}
    if which == "selective":
        keep = partial(_keep_products, cheap=rank_of(lm))
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, keep)
    lm.gradient_checkpointing_enable(arguments)
    for layer in layers_of(lm):
        layer.training = True  # transformers checkpoints no others


def _keep_products(_context: object, operator: object, *args: Any, cheap: int, **_kwargs: object) -> CheckpointPolicy:
    """Keep the outputs of KEPT's operators.

    Compiled layers write products into buffers that they reuse (`mm.out`), so those cannot be kept; attention runs
    outside the compiled code, and its outputs are.

    Args:
        cheap: recompute products whose inner dim is at most this, those of an adapter's rank: their outputs are as
            large as the frozen weight's own.
    """
    name = getattr(operator, "overloadpacket", operator)
    is_kept = name in KEPT and not getattr(operator, "_overloadname", "").endswith("out")
    is_cheap = name is torch.ops.aten.mm and args[0].shape[-1] <= cheap
    return CheckpointPolicy.MUST_SAVE if is_kept and not is_cheap else CheckpointPolicy.PREFER_RECOMPUTE


def shard(student: Student, parallel: Parallel, *, bf16: bool, cpu_offload: bool) -> None:
    """Apply FSDP2: one group per layer, and the root's for embedding, last norm and head; one in all for small models.

    FSDP divides gradients by the number of ranks by default; here they are summed, since the loss is divided already.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the teacher's log-probabilities stay float32
    )
    offload = CPUOffloadPolicy(pin_memory=parallel.device.type == "cuda") if cpu_offload else OffloadPolicy()
    settings: dict[str, Any] = {"mesh": parallel.fsdp, "mp_policy": policy, "offload_policy": offload}
    is_small = sum(param.numel() * param.element_size() for param in student.parameters()) <= SMALL_BYTES
    for layer in layers_of(student.lm) if not is_small or parallel.expert.size() > 1 else []:
        if parallel.expert.size() > 1:
            for experts in experts_of(layer):
                fully_shard(experts, **settings | {"mesh": parallel.expert_fsdp})
        fully_shard(layer, **settings)
    # The root's parameters are needed from the head's forward into its backward: gathered once.
    fully_shard(student, **settings, reshard_after_forward=False)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
