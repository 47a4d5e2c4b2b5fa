"""Read a folder's weights into the sharded student, send them to the sampler, write them to a Hugging Face folder.

The student is laid out before it is read: `empty_parameters` builds the model with empty parameters (device meta) and
real buffers; `wrap` cuts them; `load_weights` then puts each rank's part in their place. Each rank reads only its own
slices, and never holds more than its shards and one slice.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_cli.engines.weight_sync import Deferred, whole
from distill_cli.errors import ConfigError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.student.adapters import exported_name, initial_value, is_adapter, merged_parameters, plain_name


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Build modules with their parameters on meta; buffers (rotary frequencies) are real, since no file has them."""

    def to_meta(_module: nn.Module, _name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.is_meta:  # tied parameters stay the same object
            return None
        return nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may replace
    try:
        yield
    finally:
        handle.remove()


def load_weights(lm: PreTrainedModel, folder: Path, *, device: torch.device, seed: int = 0) -> None:
    """Give the parameters of a model that `empty_parameters` made the folder's values in their dtype.

    Args:
        device: device of the parameters between steps: the CPU under train.cpu_offload.
        seed: seed of adapters, which the folder does not have.

    Raises:
        ConfigError: the folder's *.safetensors lack a parameter, have another one, or one of another shape.
    """
    files: dict[str, Path] = {}  # of each tensor, from the files' headers
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            files |= dict.fromkeys(content.keys(), file)
    names: dict[int, list[str]] = {}  # a tied parameter has several
    params = dict(lm.named_parameters(remove_duplicate=False))
    for name, param in params.items():
        if not is_adapter(name):
            names.setdefault(id(param), []).append(name)
    _check_names(lm, [[plain_name(name) for name in same] for same in names.values()], files, folder)
    loaded: dict[str, torch.Tensor] = {}
    for same in names.values():
        stored = next(plain_name(name) for name in same if plain_name(name) in files)
        loaded |= dict.fromkeys(same, _read(params[same[0]], stored, files[stored], device=device))
    for name in filter(is_adapter, params):
        value = initial_value(name, params[name].shape, seed=seed)
        loaded[name] = placed(params[name], value, device=device)
    lm.load_state_dict(loaded, assign=True, strict=False)  # names are checked above; buffers stay
    empty = [name for name, param in lm.named_parameters() if param.is_meta]
    assert not empty, f"not loaded: {empty}"


def _read(param: nn.Parameter, name: str, file: Path, *, device: torch.device) -> nn.Parameter:
    with safe_open(file, framework="pt") as content:
        stored = content.get_slice(name)
        if (shape := list(stored.get_shape())) != list(param.shape):
            rule = f"config.json makes it {list(param.shape)}; the model's folder is damaged"
            raise ConfigError(f"{file}: {name} has the shape {shape}, and {rule}")
        return placed(param, stored, device=device)


def placed(param: nn.Parameter, values: Any, *, device: torch.device) -> nn.Parameter:
    """Return a parameter with `values` (a tensor, or a safetensors slice of a file) in the layout of `param`."""
    if not isinstance(param, DTensor):
        return nn.Parameter(values[...].to(device, param.dtype), requires_grad=param.requires_grad)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if 0 in shape:
        local = torch.empty(shape, dtype=param.dtype, device=device)
    else:
        part = values[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]
        local = part.to(device, param.dtype).contiguous()
    # DTensor.from_local would move a parameter in host memory to the mesh's device.
    return nn.Parameter(DTensor(local, param._spec, requires_grad=False), requires_grad=param.requires_grad)


def _check_names(lm: PreTrainedModel, names: list[list[str]], files: dict[str, Path], folder: Path) -> None:
    missing = [same[0] for same in names if not any(name in files for name in same)]
    known = {name for same in names for name in same} | {name for name, _ in lm.named_buffers()}
    ignored = [*(getattr(lm, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    extra = [n for n in files.keys() - known if not any(re.search(pattern, n) for pattern in ignored)]
    for what, wrong in (("lack", missing), ("have, and the model lacks,", sorted(extra))):
        if wrong:
            fix = "the folder is damaged, or its names are not the transformers class's"
            raise ConfigError(f"{folder}: its *.safetensors {what} {len(wrong)} tensors, such as {wrong[0]}; {fix}")


def synced_parameters(lm: PreTrainedModel, *, as_adapter: bool) -> Iterator[tuple[str, torch.Tensor | Deferred]]:
    """Yield each parameter for the sampler as it is sharded, adapters merged; a tied head is left out.

    Args:
        as_adapter: yield the adapters alone, under peft's names.
    """
    if not as_adapter:
        return merged_parameters(lm)
    return ((exported_name(name), param) for name, param in lm.named_parameters() if is_adapter(name))


def save_student(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder that transformers and vLLM load. A collective; the main rank gathers and writes."""
    state, is_main = {}, dist.get_rank() == 0
    for name, param in merged_parameters(lm):
        param = whole(param.make() if isinstance(param, Deferred) else param)
        if is_main:
            state[name] = param.to("cpu", dtype, copy=True)
    if not is_main:
        return
    lm.config.dtype = dtype
    with replacing(folder) as temporary:
        lm.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt's
