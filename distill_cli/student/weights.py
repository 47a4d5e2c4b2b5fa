"""Read a folder's weights into the sharded student, send them to the sampler, write them to a Hugging Face folder.

The student is laid out before it is read: `empty_parameters` builds the model with empty parameters (device meta) and
real buffers; `wrap` cuts them; `load_weights` then puts each rank's part in their place. Each rank reads only its own
slices, and never holds more than its shards and one slice.
"""

import contextlib
import shutil
from collections.abc import Iterator
from itertools import chain
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

from distill_cli.engines.weight_sync import Outgoing, full_tensors
from distill_cli.folders.atomic_dir import replacing
from distill_cli.student.adapters import exported_name, initial_value, is_adapter, merged_parameters, plain_name
from distill_cli.student.published import Published
from distill_cli.student.safetensors_writer import write_weights

MAX_FILE_BYTES = 5 * 10**9
"""Size of the files of a saved student, as transformers' own."""


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


def load_weights(lm: PreTrainedModel, published: Published, *, device: torch.device, seed: int = 0) -> None:
    """Give a model that `empty_parameters` made the values of its checkpoint, in its parameters' dtype.

    Args:
        device: device of the parameters between steps: the CPU under train.cpu_offload.
        seed: seed of adapters, which the checkpoint does not have.
    """
    params = {plain_name(name): param for name, param in lm.named_parameters(remove_duplicate=False)}
    buffers, loaded = dict(lm.named_buffers()), dict[int, nn.Parameter]()
    for group in published.groups:
        if group.converter is None and group.params[0] in params:
            param = params[group.params[0]]
            with safe_open(published.files[group.tensors[0]], framework="pt") as content:
                loaded[id(param)] = placed(param, content.get_slice(group.tensors[0]), device=device)
            continue
        for name, values in published.read(group).items():
            if name in params:
                loaded[id(params[name])] = placed(params[name], values, device=device)
            else:
                buffers[name].copy_(values)
    for name, param in params.items():
        if is_adapter(name):
            loaded[id(param)] = placed(param, initial_value(name, param.shape, seed=seed), device=device)
    named = {name: loaded[id(param)] for name, param in lm.named_parameters(remove_duplicate=False)}
    lm.load_state_dict(named, assign=True, strict=False)  # buffers stay
    empty = [name for name, param in lm.named_parameters() if param.is_meta]
    assert not empty, f"not loaded: {empty}"


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


def synced_parameters(lm: PreTrainedModel, published: Published, *, as_adapter: bool) -> Iterator[Outgoing]:
    """Yield the student's weights for the sampler as they are sharded, adapters merged, under their published names.

    Args:
        as_adapter: yield the adapters alone, under peft's names.
    """
    if not as_adapter:
        return published.weights(chain(merged_parameters(lm), lm.named_buffers()))
    adapters = ((name, param) for name, param in lm.named_parameters() if is_adapter(name))
    return ((exported_name(name, published.name_of), param) for name, param in adapters)


def save_student(
    lm: PreTrainedModel, published: Published, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load. A collective; the main rank gathers and writes.

    Names and layout are those of the folder that the student was read from.
    """
    state, is_main = dict[str, torch.Tensor](), dist.get_rank() == 0
    for name, tensor in full_tensors(chain(merged_parameters(lm), lm.named_buffers()), dtype=None):
        if is_main:
            state[name] = tensor.to("cpu", copy=True)
    if not is_main:
        return
    lm.config.dtype = dtype
    weights = published.stored(lambda group: {name: state[name] for name in group.params})
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        write_weights(weights, temporary, dtype=dtype, max_file_bytes=MAX_FILE_BYTES)
        lm.config.save_pretrained(temporary)
        if lm.generation_config is not None:
            lm.generation_config.save_pretrained(temporary)
        copy_processors(published.folder, temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt's


def copy_processors(base: Path, folder: Path) -> None:
    """Copy the files by which the other inputs of a multimodal model are prepared."""
    for file in base.glob("*processor*_config.json"):
        shutil.copyfile(file, folder / file.name)
