"""Tensor parallelism for dense decoders: the model's own plan for its matrices, ours for everything around them.

transformers declares for each family which linear layers are cut by columns and which by rows. The rest follows from
that: embedding and head are cut over the vocabulary (tied or not), norms between layers see every token or, under
sequence parallelism, their rank's share of them, and what stands between a column-cut and a row-cut layer (the norms of
queries and keys) sees this rank's heads.

Every parameter becomes a DTensor on the tensor axis, norms too: the gradient of a replicated one is summed where ranks
saw different tokens or heads, and the norm of the gradient counts it once. (transformers applies its plan otherwise: it
leaves norms plain and gathers logits.)

A family whose config declares no plan, or one with other styles than these: add it to PLANS, by its `model_type`.
"""

from __future__ import annotations

import fnmatch
import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from transformers import PretrainedConfig, PreTrainedModel

from distill_cli.errors import ConfigError

PLANS: dict[str, dict[str, str]] = {}
"""model_type -> {name pattern of a linear layer under the base model: colwise | rowwise}, for families whose own config
declares none that serves."""

TESTED = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
TOKENS, HEADS = 1, 2
"""Dims: tokens of [1, T, H]; heads of [1, T, heads, D]."""


def matrix_plan(config: PretrainedConfig) -> dict[str, str]:
    """{name pattern: colwise | rowwise} of the linear layers under the base model.

    Raises:
        ConfigError: the family has none that serves.
    """
    plan = PLANS.get(config.model_type) or getattr(config, "base_model_tp_plan", None) or {}
    matrices = {name: style for name, style in plan.items() if style in ("colwise", "rowwise")}
    ours = {"replicated_with_grad_allreduce", "embedding_rowwise", "colwise", "rowwise"}  # norms, embedding: as below
    others = set(plan.values()) - ours
    if not matrices or others:
        why = f"its plan has the styles {', '.join(sorted(others))}" if others else "it declares no plan"
        raise ConfigError(
            f"mesh.tensor: the family {config.model_type} cannot be cut ({why}); tested are {', '.join(TESTED)}, and "
            "dense families whose transformers config has a base_model_tp_plan of colwise and rowwise layers work; for "
            "another one, add its linear layers to PLANS in distill_cli/parallel/tensor.py, or set mesh.tensor=1"
        )
    return matrices


def check_sizes(config: PretrainedConfig, size: int) -> None:
    """Raises ConfigError, with the sizes that do, where `size` does not divide what is cut."""
    cut = {
        "attention heads": config.num_attention_heads,
        "key-value heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "the MLP's size": config.intermediate_size,
        "the vocabulary": config.vocab_size,
    }
    if any(number % size for number in cut.values()):
        common = math.gcd(*cut.values())
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        sizes = ", ".join(f"{name} ({number})" for name, number in cut.items() if number % size)
        raise ConfigError(f"mesh.tensor={size}: does not divide {sizes} of the student; choose one of {fits}")


def apply_tensor_parallel(lm: PreTrainedModel, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Cuts the model over `mesh`, in place; does nothing for one rank. Every rank must call it.

    The base model then takes whole rows of tokens and returns hidden states: whole, or under sequence parallelism this
    rank's share of the tokens (`gather_hidden` makes them whole).
    """
    if mesh.size() == 1:
        return
    config = lm.config.get_text_config()
    check_sizes(config, mesh.size())
    between_layers = Shard(TOKENS) if sequence_parallel else Replicate()
    head, plan = lm.get_output_embeddings(), _matrix_styles(lm, between_layers)
    plan[_name_of(lm, lm.get_input_embeddings())] = VocabularyParallelEmbedding(output=between_layers)
    plan[_name_of(lm, head)] = ColwiseParallel()  # cut for the fused head, which never calls it
    for name, module in lm.named_modules():
        if next(module.parameters(recurse=False), None) is None or name in plan:
            continue
        inside = name.rsplit(".", 1)[0].endswith(("self_attn", "attention"))
        plan[name] = ReplicatedParameters(Shard(HEADS) if inside else between_layers)
    if sequence_parallel:  # one gathering for each half of a layer, instead of one for each matrix
        for layer_name in _layer_names(lm):
            plan[f"{layer_name}.self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": between_layers},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                use_local_output=True,
            )
            plan[f"{layer_name}.mlp"] = PrepareModuleInput(
                input_layouts=(between_layers,), desired_input_layouts=(Replicate(),), use_local_output=True
            )
    tied = head.weight is lm.get_input_embeddings().weight
    parallelize_module(lm, mesh, plan)
    if tied:  # both were cut over the vocabulary, each on its own
        head.weight = lm.get_input_embeddings().weight
    plain = [name for name, param in lm.named_parameters() if not isinstance(param, DTensor)]
    assert not plain, f"not on the tensor axis: {plain}"


def _matrix_styles(lm: PreTrainedModel, between_layers: Placement) -> dict[str, ParallelStyle]:
    """{name: style} of the linear layers. Those with an adapter (`student.adapters`) have three matrices.

    Of an adapter that matrix is cut which meets the layer's cut dim: B [out, rank] where the layer is cut by columns, A
    [rank, in] where by rows. What lies between the two is whole, or this rank's tokens of it, and small.
    """
    styles = {"colwise": ColwiseParallel, "rowwise": lambda: RowwiseParallel(output_layouts=between_layers)}
    plan: dict[str, ParallelStyle] = {}
    for pattern, style in matrix_plan(lm.config.get_text_config()).items():
        pattern = f"{_name_of(lm, lm.base_model)}.{pattern}"
        for name, module in lm.named_modules():
            if not fnmatch.fnmatch(name, pattern):
                continue
            if not hasattr(module, "lora_A"):
                plan[name] = styles[style]()
                continue
            a, b = f"{name}.lora_A.default", f"{name}.lora_B.default"
            plan[f"{name}.base_layer"] = styles[style]()
            if style == "colwise":
                plan |= {a: ReplicatedParameters(Replicate()), b: styles[style]()}
            else:
                plan |= {a: styles[style](), b: ReplicatedParameters(between_layers)}
    left = [
        name for name, module in lm.named_modules() if hasattr(module, "lora_A") and f"{name}.base_layer" not in plan
    ]
    if left:
        raise ConfigError(
            f"model.student.lora.targets: {left[0]} is not among the layers that mesh.tensor cuts; name others, or set "
            "mesh.tensor=1"
        )
    return plan


def gather_hidden(hidden_1TH: torch.Tensor, mesh: DeviceMesh, *, sequence_parallel: bool) -> torch.Tensor:
    """The base model's output, whole, for a head that is cut over the vocabulary. A collective.

    In backward the head's gradient is partial, its vocabulary's part: it is summed over `mesh`, and under sequence
    parallelism scattered back.
    """
    placement = Shard(TOKENS) if sequence_parallel else Replicate()
    hidden = DTensor.from_local(hidden_1TH, mesh, [placement], run_check=False)
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


class ReplicatedParameters(ParallelStyle):
    """Parameters replicated as DTensors, activations local tensors that are cut as `placement` says.

    Where they are cut, a parameter's gradient is partial, and DTensor sums it; where they are whole, it is equal.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def partition(_name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            _distribute_parameters(part, mesh, Replicate())

        def take(_module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
            return DTensor.from_local(inputs[0], mesh, [self.placement], run_check=False), *inputs[1:]

        def give(_module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> torch.Tensor:
            return output.to_local()

        return distribute_module(module, mesh, partition, take, give)


class VocabularyParallelEmbedding(ParallelStyle):
    """An embedding cut over the vocabulary: each rank looks up its own rows, zero elsewhere, and the sum is the output.

    A family's own factor (`embed_scale`: Gemma scales by sqrt(H)) stays; whatever else its embedding did would be lost.
    """

    def __init__(self, *, output: Placement) -> None:
        self.output = output

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def partition(_name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            _distribute_parameters(part, mesh, Shard(0))

        distribute_module(module, mesh, partition)
        scale = getattr(module, "embed_scale", None)
        scale = scale.to_local() if isinstance(scale, DTensor) else scale

        def forward(ids: torch.Tensor) -> torch.Tensor:
            weight = module.weight
            shard = weight.to_local() if isinstance(weight, DTensor) else weight
            size = shard.shape[0]
            local_ids = ids - mesh.get_local_rank() * size
            elsewhere = (local_ids < 0) | (local_ids >= size)
            rows = nn.functional.embedding(local_ids.masked_fill(elsewhere, 0), shard)
            rows = rows.masked_fill(elsewhere[..., None], 0.0)
            if module.padding_idx is not None:  # no gradient comes from there, as in torch's own
                rows = torch.where((ids == module.padding_idx)[..., None], rows.detach(), rows)
            rows = rows if scale is None else rows * scale.to(rows)
            partial = DTensor.from_local(rows, mesh, [Partial()], run_check=False)
            return partial.redistribute(placements=[self.output]).to_local()

        module.forward = forward
        return module


def _distribute_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, param in list(module.named_parameters(recurse=False)):
        cut = distribute_tensor(param, mesh, [placement])
        module.register_parameter(name, nn.Parameter(cut, requires_grad=param.requires_grad))


def _layer_names(lm: PreTrainedModel) -> list[str]:
    prefix = _name_of(lm, lm.base_model)
    return [f"{prefix}.layers.{index}" for index in range(len(lm.base_model.layers))]


def _name_of(root: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in root.named_modules() if candidate is module)
