"""Expert parallelism: ranks that share the experts of each layer exchange tokens instead of gathering experts.

The expert axis is cut out of the shard axis: its ranks have sequences of their own, as all shard ranks do. Experts are
cut over it by their first dim, and then sharded by FSDP2 over the ranks that have the same experts; all other
parameters are sharded over the whole shard axis. In a layer each rank sends each of its tokens to the ranks of the
experts that the router chose, which send the outputs back; routing weights are applied at home. No token is dropped.

Works for every family whose experts take (hidden states, experts of each token, weights) by transformers' interface of
experts, through the implementation that the model would use otherwise.

Shape letters: N tokens of this rank, k experts of each, M tokens that this rank's experts get, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from distill_cli.errors import ConfigError

NAME = "distill_expert_parallel"


def experts_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules that hold a layer's experts, stacked, by transformers' interface of experts."""
    return [part for part in module.modules() if hasattr(part, "is_concatenated") and hasattr(part, "num_experts")]


def apply_expert_parallel(lm: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut the experts over `mesh`, in place; do nothing for one rank. Every rank must call it.

    Raises:
        ConfigError: the model has no experts, or their number is not divisible.
    """
    if mesh.size() == 1:
        return
    found = experts_of(lm)
    if not found:
        raise ConfigError(f"mesh.expert={mesh.size()}: {type(lm).__name__} has no experts; set it to 1")
    ALL_EXPERTS_FUNCTIONS.register(NAME, expert_parallel_forward)
    for module in found:
        experts: Any = module
        if experts.num_experts % mesh.size():
            what = f"does not divide the {experts.num_experts} experts of the student"
            raise ConfigError(f"mesh.expert={mesh.size()}: {what}; choose a divisor")
        for name, param in list(module.named_parameters()):
            cut = distribute_tensor(param, mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(cut, requires_grad=param.requires_grad))
        experts.expert_mesh, experts.local_implementation = mesh, experts.config._experts_implementation
    configs: list[Any] = [experts.config for experts in found]
    for config in configs:
        config._experts_implementation = NAME


def expert_parallel_forward(
    module: Any, hidden_NH: torch.Tensor, index_Nk: torch.Tensor, weights_Nk: torch.Tensor
) -> torch.Tensor:
    """Return the experts' weighted outputs for this rank's tokens: [N, H]. A collective, in backward too."""
    mesh: DeviceMesh = module.expert_mesh
    num_local, num_top = module.num_experts // mesh.size(), index_Nk.shape[1]
    index, order = index_Nk.flatten().sort(stable=True)  # by expert, and so by rank
    sent = (index // num_local).bincount(minlength=mesh.size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=mesh.get_group())
    sizes, back = received.tolist(), sent.tolist()
    local_index = torch.empty(sum(sizes), dtype=index.dtype, device=index.device)
    dist.all_to_all_single(local_index, index % num_local, sizes, back, group=mesh.get_group())
    inputs = _exchange(hidden_NH[order // num_top], sizes, back, mesh)
    outputs = _exchange(_local_forward(module, inputs, local_index, num_local), back, sizes, mesh)
    weighted = outputs * weights_Nk.flatten()[order][:, None].to(outputs.dtype)
    return torch.zeros_like(hidden_NH).index_add(0, order // num_top, weighted.to(hidden_NH.dtype))


def _exchange(x_MH: torch.Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> torch.Tensor:
    """Send `sent` rows to each rank and return the `received` ones. A collective, in backward too."""
    return all_to_all_single_autograd(x_MH.contiguous(), received, sent, mesh.get_group())


def _local_forward(module: Any, hidden_MH: torch.Tensor, index_M: torch.Tensor, num_local: int) -> torch.Tensor:
    """Run this rank's experts on the tokens that it got.

    A row of zeros is added: parameters without a token would have no gradient, and FSDP would not reduce it, while
    other ranks wait for it.
    """
    hidden = torch.cat([hidden_MH, hidden_MH.new_zeros(1, hidden_MH.shape[1])])
    index = torch.cat([index_M, index_M.new_zeros(1)])[:, None]
    with _local_parameters(module, num_local):
        own = type(module).forward.__wrapped__
        forward = ALL_EXPERTS_FUNCTIONS.get_interface(module.local_implementation, own)
        made = forward(module, hidden, index, hidden.new_ones(len(hidden), 1))
    return made[:-1] + 0 * made[-1:]


@contextmanager
def _local_parameters(module: Any, num_local: int) -> Iterator[None]:
    """Let the module see its own experts alone, as plain tensors whose gradients are whole."""
    params, num_experts = dict(module._parameters), module.num_experts
    try:
        for name, param in params.items():
            if isinstance(param, DTensor):
                module._parameters[name] = param.to_local(grad_placements=[Shard(0)])
        module.num_experts = num_local
        yield
    finally:
        module._parameters.update(params)
        module.num_experts = num_experts
