"""Differences between the supported versions of torch, one function each. Names are looked up, not assumed.

Importing this module does not import torch, which the launcher never does.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@cache
def torchrun_knows(option: str) -> bool:
    """Return whether the source of the installed torchrun has an option.

    Symptom: torchrun refuses to start with an option that it does not know. torch 2.13 has `--shutdown-timeout`, 2.11
    has not.
    """
    found = importlib.util.find_spec("torch")  # imports nothing
    folders = list(found.submodule_search_locations or ()) if found else []
    return any(f'"{option}"' in (Path(folder) / "distributed" / "run.py").read_text() for folder in folders)


def varlen_attention(
    query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, *arguments: Any, **keywords: Any
) -> torch.Tensor:
    """Call `torch.nn.attention.varlen.varlen_attn`; keys and values may have fewer heads than queries.

    Symptom: torch 2.11 has no `enable_gqa` there; keys and values are repeated for each query's head.

    Args:
        arguments, keywords: the bounds, longest lengths, `window_size` and `scale` of `varlen_attn`.
    """
    from torch.nn.attention.varlen import varlen_attn

    num_groups = query_THD.shape[1] // key_TGD.shape[1]
    if num_groups > 1 and _varlen_knows_groups():
        keywords["enable_gqa"] = True
    elif num_groups > 1:
        key_TGD, value_TGD = (x.repeat_interleave(num_groups, dim=1) for x in (key_TGD, value_TGD))
    # A tuple only with `return_aux`.
    return varlen_attn(query_THD, key_TGD, value_TGD, *arguments, **keywords)  # type: ignore[return-value]


def all_gather(output: torch.Tensor, part: torch.Tensor, *, group: dist.ProcessGroup | None) -> None:
    """Gather each rank's `part`, one after the other, into `output`. A collective.

    Symptom: torch 2.13 warns that `all_gather_into_tensor` is now `all_gather_single`; 2.11 has only the former.
    """
    import torch.distributed as dist

    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, part, group=group)


def reduce_scatter(output: torch.Tensor, parts: torch.Tensor, *, group: dist.ProcessGroup | None) -> None:
    """Sum the ranks' `parts`, and keep this rank's piece of the sum in `output`. A collective.

    Symptom: as for `all_gather`, `reduce_scatter_tensor` is now `reduce_scatter_single`.
    """
    import torch.distributed as dist

    reduce: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(output, parts, op=dist.ReduceOp.SUM, group=group)


def varlen_operator() -> object:
    """Return the operator behind `varlen_attn`, by which selective checkpointing recognizes it.

    Symptom: it is registered only when its module is imported; a torch that renames it would silently compute attention
    again in the backward pass, so it must be there.
    """
    import torch
    import torch.nn.attention.varlen

    return torch.ops.torch_attn._varlen_attn


@cache
def _varlen_knows_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
