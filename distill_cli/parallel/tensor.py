"""Tensor parallelism for dense decoders: the model's own plan for its matrices, and a plan for all other layers.

transformers declares for each family which linear layers are cut by columns and which by rows. The rest follows:
embedding and head are cut over the vocabulary (tied or not), norms between layers see every token or, under sequence
parallelism, their rank's share of them, and modules between a column-cut and a row-cut layer (the norms of queries and
keys) see this rank's heads.

Every parameter becomes a DTensor on the tensor axis, norms too: the gradient of a replicated one is summed if ranks saw
different tokens or heads, and the norm of the gradient counts it once. (transformers itself leaves norms plain and
gathers logits.)

To add a family whose config declares no plan, or one with other styles, put it into PLANS (models/tensor_plan.py).
"""

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from transformers import PreTrainedModel

from distill_cli.errors import ConfigError
from distill_cli.models.tensor_plan import check_sizes, matrix_plan

TOKENS, HEADS = 1, 2
"""Dims: tokens of [1, T, H]; heads of [1, T, heads, D]."""


def apply_tensor_parallel(lm: PreTrainedModel, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Cut the model over `mesh`, in place; do nothing for one rank. Every rank must call it.

    The base model then takes whole rows of tokens and returns hidden states: whole, or under sequence parallelism this
    rank's share of the tokens (`gather_hidden` makes them whole).
    """
    if mesh.size() == 1:
        return
    check_sizes(lm.config.get_text_config().to_dict(), mesh.size())
    between_layers = Shard(TOKENS) if sequence_parallel else Replicate()
    head, embedding, plan = lm.get_output_embeddings(), lm.get_input_embeddings(), _matrix_styles(lm, between_layers)
    plan[_name_of(lm, embedding)] = VocabularyParallelEmbedding(output=between_layers)
    plan[_name_of(lm, head)] = ColwiseParallel()  # cut for the fused head, which never calls it
    for name, module in lm.named_modules():
        if next(module.parameters(recurse=False), None) is None or name in plan:
            continue
        inside = name.rsplit(".", 1)[0].endswith(("self_attn", "attention"))
        plan[name] = ReplicatedParameters(Shard(HEADS) if inside else between_layers)
    if sequence_parallel:  # one gathering for each half of a layer, instead of one for each matrix
        cut: dict[str, Placement] = {"hidden_states": between_layers}
        whole: dict[str, Placement] = {"hidden_states": Replicate()}
        layers = f"{_name_of(lm, lm.get_decoder())}.layers.*"
        plan[f"{layers}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts=cut, desired_input_kwarg_layouts=whole, use_local_output=True
        )
        by_place: dict[str, Any] = {"input_layouts": (between_layers,), "desired_input_layouts": (Replicate(),)}
        plan[f"{layers}.mlp"] = PrepareModuleInput(**by_place, use_local_output=True)
        if any(name.endswith(".attention") for name, _ in lm.named_modules()):  # GPT-NeoX
            plan[f"{layers}.attention"] = PrepareModuleInput(**by_place, use_local_output=True)
    tied = head.weight is embedding.weight
    parallelize_module(lm, mesh, plan)
    if tied:  # both were cut over the vocabulary, each on its own
        head.weight = embedding.weight
    plain = [name for name, param in lm.named_parameters() if not isinstance(param, DTensor)]
    assert not plain, f"not on the tensor axis: {plain}"


def _matrix_styles(lm: PreTrainedModel, between_layers: Placement) -> dict[str, ParallelStyle]:
    """Return {name: style} of the linear layers. Those with an adapter (`student.adapters`) have three matrices.

    An adapter's matrix that meets the layer's cut dim is cut: B [out, rank] if the layer is cut by columns, A
    [rank, in] if by rows. The activations between A and B are whole, or this rank's tokens of them, and small.
    """
    rowwise = partial(RowwiseParallel, output_layouts=between_layers)
    styles: dict[str, Callable[[], ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": rowwise}
    plan: dict[str, ParallelStyle] = {}
    config, decoder = lm.config.get_text_config(), _name_of(lm, lm.get_decoder())
    declared = matrix_plan(config.to_dict(), getattr(config, "base_model_tp_plan", None))
    matrices = {f"{decoder}.{pattern}": style for pattern, style in declared.items()}
    for name, module in lm.named_modules():
        style = next((style for pattern, style in matrices.items() if fnmatch.fnmatch(name, pattern)), None)
        has_adapter = hasattr(module, "lora_A")
        if style is None and has_adapter:
            raise ConfigError(
                f"model.student.lora.targets: mesh.tensor does not cut {name}; name others, or set mesh.tensor=1"
            )
        if style is not None:
            plan[f"{name}.base_layer" if has_adapter else name] = styles[style]()
        if has_adapter and style == "colwise":
            plan[f"{name}.lora_A.default"] = ReplicatedParameters(Replicate())
            plan[f"{name}.lora_B.default"] = ColwiseParallel()
        elif has_adapter:
            plan[f"{name}.lora_A.default"] = rowwise()
            plan[f"{name}.lora_B.default"] = ReplicatedParameters(between_layers)
    return plan


def gather_hidden(hidden_1TH: torch.Tensor, mesh: DeviceMesh, *, sequence_parallel: bool) -> torch.Tensor:
    """Return the base model's output, whole, for a head that is cut over the vocabulary. A collective.

    In backward the head's gradient is partial, its vocabulary's part: it is summed over `mesh`, and under sequence
    parallelism scattered back.
    """
    placement = Shard(TOKENS) if sequence_parallel else Replicate()
    hidden = DTensor.from_local(hidden_1TH, mesh, [placement], run_check=False)
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


class ReplicatedParameters(ParallelStyle):
    """Parameters replicated as DTensors, activations local tensors cut by `placement`.

    If they are cut, a parameter's gradient is partial, and DTensor sums it; if they are whole, it is equal.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def take(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return DTensor.from_local(inputs[0], mesh, [self.placement], run_check=False), *inputs[1:]

        _distribute_parameters(module, mesh, Replicate())
        module.register_forward_pre_hook(take)
        module.register_forward_hook(lambda _module, _inputs, output: output.to_local())
        return module


class VocabularyParallelEmbedding(ParallelStyle):
    """An embedding cut over the vocabulary: each rank looks up its own rows, zero elsewhere, and the sum is the output.

    A family's own factor (`embed_scale`: Gemma scales by sqrt(H)) stays; anything else that its embedding does is lost.
    """

    def __init__(self, *, output: Placement) -> None:
        self.output = output

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute_parameters(module, mesh, Shard(0))
        embedding: Any = module

        def forward(ids: torch.Tensor) -> torch.Tensor:
            weight = embedding.weight
            shard = weight.to_local() if isinstance(weight, DTensor) else weight
            size = shard.shape[0]
            local_ids = ids - mesh.get_local_rank() * size
            elsewhere = (local_ids < 0) | (local_ids >= size)
            rows = nn.functional.embedding(local_ids.masked_fill(elsewhere, 0), shard)
            rows = rows.masked_fill(elsewhere[..., None], 0.0)
            if embedding.padding_idx is not None:  # it gets no gradient, as in torch's own
                rows = torch.where((ids == embedding.padding_idx)[..., None], rows.detach(), rows)
            if hasattr(embedding, "embed_scale"):
                rows = rows * embedding.embed_scale.to(rows)
            part = DTensor.from_local(rows, mesh, [Partial()], run_check=False)
            return part.redistribute(placements=[self.output]).to_local()

        module.forward = forward
        return module


def _distribute_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, param in list(module.named_parameters(recurse=False)):
        cut = distribute_tensor(param, mesh, [placement])
        module.register_parameter(name, nn.Parameter(cut, requires_grad=param.requires_grad))


def _name_of(root: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in root.named_modules() if candidate is module)
