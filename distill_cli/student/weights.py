"""The student's weights, handed out: to the sampler's engine, and to a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from distill_cli.student.model import Student


def named_parameters(student: Student) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter, sharded as it is, under its Hugging Face name; a tied head is left out."""
    return student.lm.named_parameters()


def save_student(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype) -> None:
    """A Hugging Face folder that transformers and vLLM load. A collective; the main rank holds all and writes."""
    state, is_main = {}, dist.get_rank() == 0
    for name, param in named_parameters(student):
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        if is_main:
            state[name] = whole.detach().to("cpu", dtype, copy=True)
    if not is_main:
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    student.lm.config.dtype = dtype
    student.lm.save_pretrained(temporary, state_dict=state)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that ended earlier
    temporary.replace(folder)
