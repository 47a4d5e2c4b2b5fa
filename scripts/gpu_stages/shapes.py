"""Make models with the shapes of real ones and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
QWEN3 |= {"vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "eos_token_id": 0}
STUDENT = QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
"""Qwen3-1.7B's, from its config.json."""
TEACHER = QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
"""Qwen3-4B's."""
TINY = {"vocab_size": 512, "head_dim": 32, "num_key_value_heads": 2, "num_attention_heads": 4, "intermediate_size": 192}
TINY |= {"num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 2048}


def student_shape(*, rehearse: bool) -> dict[str, Any]:
    return STUDENT | TINY if rehearse else STUDENT


def teacher_shape(*, rehearse: bool) -> dict[str, Any]:
    return TEACHER | TINY | {"num_hidden_layers": 3} if rehearse else TEACHER


def make_model(folder: Path, shape: dict[str, Any], *, device: str) -> Path:
    """Make a folder with random bfloat16 weights and a tokenizer in which the word `t<id>` is token <id>, if not there.

    The weights are transformers' own initialisation: next tokens are about equally likely, and no answer ends before
    its length limit.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(len(folder.name))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(shape["vocab_size"])}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", unk_token="t1")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def make_pair(scratch: Path, *, device: str, rehearse: bool) -> tuple[Path, Path]:
    """Make student and teacher, which the stages of a run share; return their folders."""
    student = make_model(scratch / "student", student_shape(rehearse=rehearse), device=device)
    teacher = make_model(scratch / "teacher", teacher_shape(rehearse=rehearse), device=device)
    if device == "cuda":
        torch.cuda.empty_cache()
    return student, teacher
