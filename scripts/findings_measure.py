"""Measure the student of a finished run on held-out problems, by transformers alone.

A run's own metrics compare the models on the run's own support; these numbers are the same for every loss.

Shape letters: B problems, N answers to each, A answers to all, T tokens of prompt and answer,
R of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.data.registry import load_examples, resolve_verifier
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_files import locate


@torch.inference_mode()
def measure(folder: Path, *, num_problems: int, num_answers: int) -> dict[str, float]:
    """Measure the student of the run in `folder` on the first held-out problems.

    Returns:
        `pass@1` and `pass@k` of k = `num_answers` answers to each problem, sampled at temperature 1, and `truncated`,
        the share of them that reach rollout.max_new_tokens. In nats, over the whole vocabulary, and means over the
        tokens of the first answer to each problem: `kl_forward`, `kl_reverse`, `entropy`.
    """
    run = RunDir(folder)
    config = yaml.safe_load(run.config.read_text())
    tokenizer = AutoTokenizer.from_pretrained(run.student, padding_side="left")
    student: Any = AutoModelForCausalLM.from_pretrained(run.student, dtype=torch.float32)
    path = locate(config["model"]["teacher"]["path"], key="model.teacher.path")
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    problems = list(islice(load_examples(config["data"]["validation"], key="data.validation"), num_problems))
    verify, limit = resolve_verifier(config["data"]["verifier"]), config["rollout"]["max_new_tokens"]
    ends = torch.tensor(student.generation_config.eos_token_id).reshape(-1)
    prompt = tokenizer([shown(tokenizer, one.question) for one in problems], return_tensors="pt", padding=True)
    start, firsts = prompt.input_ids.shape[1], slice(None, None, num_answers)
    torch.manual_seed(0)
    ids_AT = student.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=limit, num_return_sequences=num_answers)
    is_end_AR = torch.isin(ids_AT[:, start:], ends)
    is_answer_AR = is_end_AR.cumsum(1) - is_end_AR.long() == 0
    """Up to the end token, and with it."""
    answers = zip(ids_AT[:, start:], is_answer_AR, strict=True)
    texts = [str(tokenizer.decode(ids_R[is_answer_R], skip_special_tokens=True)) for ids_R, is_answer_R in answers]
    right = [verify(text, str(problems[row // num_answers].answer)) > 0 for row, text in enumerate(texts)]
    right_BN = torch.tensor(right).view(-1, num_answers).double()
    seen_BT = torch.cat([prompt.attention_mask, is_answer_AR[firsts].long()], 1)
    compared = divergences([student, teacher], ids_AT[firsts], seen_BT, start=start)[is_answer_AR[firsts]]
    return {
        "pass@1": right_BN.mean().item(),
        "pass@k": right_BN.amax(1).mean().item(),
        "truncated": 1 - is_end_AR.any(1).double().mean().item(),
        **dict(zip(("kl_forward", "kl_reverse", "entropy"), compared.mean(0).tolist(), strict=True)),
    }


def shown(tokenizer: Any, question: str) -> str:
    """Return the text of a prompt."""
    message = {"role": "user", "content": question}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def divergences(pair: Sequence[Any], ids_BT: torch.Tensor, seen_BT: torch.Tensor, *, start: int) -> torch.Tensor:
    """Return forward KL, reverse KL and the student's entropy where each answer token is predicted: [B, T - start, 3].

    Args:
        pair: the student and the teacher.
        seen_BT: 1 at the tokens of prompts, padded on the left, and of answers.
        start: where the answers start.
    """
    inputs = {"attention_mask": seen_BT, "position_ids": (seen_BT.cumsum(1) - 1).clamp_min(0)}
    student_BRV, teacher_BRV = (
        model(ids_BT, **inputs, logits_to_keep=ids_BT.shape[1] - start + 1).logits[:, :-1].log_softmax(-1)
        for model in pair
    )
    gap_BRV = teacher_BRV - student_BRV
    forward_BR, reverse_BR = (teacher_BRV.exp() * gap_BRV).sum(-1), -(student_BRV.exp() * gap_BRV).sum(-1)
    return torch.stack([forward_BR, reverse_BR, -(student_BRV.exp() * student_BRV).sum(-1)], -1)
