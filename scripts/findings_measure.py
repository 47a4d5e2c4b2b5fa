"""Measure the student of a finished run on held-out problems, by transformers alone.

A run's own metrics compare the models on the run's own support; these numbers are the same for every loss.

Shape letters: B problems, N answers to each, A answers to all, T tokens of prompt and answer,
R of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.data.registry import load_examples, resolve_verifier
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_files import locate


@dataclass(frozen=True)
class Answers:
    """Sampled answers, each after its prompt."""

    ids_AT: torch.Tensor
    seen_AT: torch.Tensor
    """1 at the tokens of prompts, padded on the left, and of answers."""
    is_answer_AR: torch.Tensor
    """Up to the end token, and with it."""
    is_cut_A: torch.Tensor
    """Without an end token."""

    @property
    def start(self) -> int:
        """Where the answers start."""
        return self.ids_AT.shape[1] - self.is_answer_AR.shape[1]

    def texts(self, tokenizer: Any) -> list[str]:
        rows = zip(self.ids_AT[:, self.start :], self.is_answer_AR, strict=True)
        return [str(tokenizer.decode(ids_R[is_answer_R], skip_special_tokens=True)) for ids_R, is_answer_R in rows]

    def part(self, rows: slice) -> Answers:
        return Answers(self.ids_AT[rows], self.seen_AT[rows], self.is_answer_AR[rows], self.is_cut_A[rows])


def measure(folder: Path, *, num_problems: int, num_answers: int) -> dict[str, float]:
    """Measure the student of the run in `folder` on the first held-out problems.

    Returns:
        `pass@1` and `pass@k` of k = `num_answers` answers to each problem, sampled at temperature 1, and `truncated`,
        the share of them that reach rollout.max_new_tokens. In nats, over the whole vocabulary, and means over the
        tokens of the first answer to each problem: `kl_forward`, `kl_reverse`, `entropy`.
    """
    run = RunDir(folder)
    config = yaml.safe_load(run.config.read_text())
    tokenizer, student = AutoTokenizer.from_pretrained(run.student, padding_side="left"), load_model(run.student)
    teacher = load_model(locate(config["model"]["teacher"]["path"], key="model.teacher.path"))
    problems = list(islice(load_examples(config["data"]["validation"], key="data.validation"), num_problems))
    verify, limit = resolve_verifier(config["data"]["verifier"]), config["rollout"]["max_new_tokens"]
    questions = [one.question for one in problems]
    answers = sample(student, tokenizer, questions, limit=limit, num_answers=num_answers)
    texts = answers.texts(tokenizer)
    right = [verify(text, str(problems[row // num_answers].answer)) > 0 for row, text in enumerate(texts)]
    right_BN = torch.tensor(right).view(-1, num_answers).double()
    compared = divergences([student, teacher], answers.part(slice(None, None, num_answers)))
    return {
        "pass@1": right_BN.mean().item(),
        "pass@k": right_BN.amax(1).mean().item(),
        "truncated": answers.is_cut_A.double().mean().item(),
        **{name: compared[name] for name in ("kl_forward", "kl_reverse", "entropy")},
    }


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, questions: Sequence[str], *, limit: int, num_answers: int = 1) -> Answers:
    """Sample answers of at most `limit` tokens at temperature 1, with a seed of its own.

    Args:
        tokenizer: pads on the left.
    """
    prompt = tokenizer([shown(tokenizer, question) for question in questions], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids_AT = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=limit, num_return_sequences=num_answers)
    ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1)
    is_end_AR = torch.isin(ids_AT[:, prompt.input_ids.shape[1] :], ends)
    is_answer_AR = is_end_AR.cumsum(1) - is_end_AR.long() == 0
    seen_AT = torch.cat([prompt.attention_mask.repeat_interleave(num_answers, 0), is_answer_AR.long()], 1)
    return Answers(ids_AT, seen_AT, is_answer_AR, ~is_end_AR.any(1))


def shown(tokenizer: Any, question: str) -> str:
    """Return the text of a prompt."""
    message = {"role": "user", "content": question}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def divergences(pair: Sequence[Any], answers: Answers, *, batch_size: int = 32) -> dict[str, float]:
    """Compare the student and the teacher where each token of the answers is predicted, over the whole vocabulary.

    Returns:
        Means over the tokens: `kl_forward`, `kl_reverse` and `entropy`, the student's, in nats, and `agreement`, the
        share at which both hold the same token for the likeliest.
    """
    parts = [answers.part(slice(at, at + batch_size)) for at in range(0, len(answers.ids_AT), batch_size)]
    means = torch.cat([_compared(pair, part) for part in parts]).double().mean(0).tolist()
    return dict(zip(("kl_forward", "kl_reverse", "entropy", "agreement"), means, strict=True))


def _compared(pair: Sequence[Any], answers: Answers) -> torch.Tensor:
    """Return what `divergences` returns the means of, as [number of answer tokens, 4]."""
    positions_AT = (answers.seen_AT.cumsum(1) - 1).clamp_min(0)
    inputs = {"attention_mask": answers.seen_AT, "position_ids": positions_AT}
    kept = answers.ids_AT.shape[1] - answers.start + 1
    student_ARV, teacher_ARV = (
        model(answers.ids_AT, **inputs, logits_to_keep=kept).logits[:, :-1].log_softmax(-1) for model in pair
    )
    gap_ARV = teacher_ARV - student_ARV
    forward_AR, reverse_AR = (teacher_ARV.exp() * gap_ARV).sum(-1), -(student_ARV.exp() * gap_ARV).sum(-1)
    entropy_AR = -(student_ARV.exp() * student_ARV).sum(-1)
    is_same_AR = (student_ARV.argmax(-1) == teacher_ARV.argmax(-1)).float()
    return torch.stack([forward_AR, reverse_AR, entropy_AR, is_same_AR], -1)[answers.is_answer_AR]
