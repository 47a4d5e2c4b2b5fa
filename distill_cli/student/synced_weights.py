"""Give the student's weights to the sampler's engine, and write them to a Hugging Face folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from distill_cli.engines.weight_sync import Deferred, whole
from distill_cli.folders.atomic_dir import replacing
from distill_cli.student.adapters import exported_name, is_adapter, merged_parameters
from distill_cli.student.model import Student


def synced_parameters(student: Student, *, as_adapter: bool) -> Iterator[tuple[str, torch.Tensor | Deferred]]:
    """Yield each parameter for the sampler as it is sharded, adapters merged; a tied head is left out.

    Args:
        as_adapter: yield the adapters alone, under peft's names.
    """
    if not as_adapter:
        return merged_parameters(student.lm)
    return ((exported_name(name), param) for name, param in student.lm.named_parameters() if is_adapter(name))


def save_student(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder that transformers and vLLM load. A collective; the main rank gathers and writes."""
    state, is_main = {}, dist.get_rank() == 0
    for name, param in merged_parameters(student.lm):
        param = whole(param.make() if isinstance(param, Deferred) else param)
        if is_main:
            state[name] = param.to("cpu", dtype, copy=True)
    if not is_main:
        return
    student.lm.config.dtype = dtype
    with replacing(folder) as temporary:
        student.lm.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt's
