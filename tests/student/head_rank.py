"""A rank's side of `test_teacher_head.py`; `forked.run_cases` starts it."""

from typing import Any

import torch

from distill_cli.parallel.mesh import layout
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.types import ModelHead
from tests.student.forked import case_ranks

STUDENT_VOCAB, HIDDEN, TOKENS = 24, 6, 5


def make_head(case: dict[str, Any]) -> ModelHead:
    generator = torch.Generator().manual_seed(case["seed"])
    weight = torch.randn(case["rows"], HIDDEN, generator=generator)
    bias = torch.randn(case["rows"], generator=generator) if case["with_bias"] else None
    return ModelHead(weight, bias, scale=0.8, soft_cap=3.0 if case["with_bias"] else None)


def hidden_and_ids(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    return hidden, torch.stack([torch.randperm(vocab_size, generator=generator)[:4] for _ in range(TOKENS)])


def log_probabilities(case: dict[str, Any]) -> list[torch.Tensor]:
    """Return the log-probabilities that two shared heads give, [N, K] each, after comparing the gathered rows."""
    parallel = layout(device=torch.device("cpu"), **case["mesh"])
    heads = TeacherHeads(parallel, case["vocab_size"], STUDENT_VOCAB // parallel.tensor.size())
    whole = [make_head(case), make_head(case | {"seed": 1})]
    for index, head in enumerate(whole):
        heads.read(index, head.part)
    hidden, ids = hidden_and_ids(case["vocab_size"])
    first, last = heads.rows(0)
    gathered = heads.gather()
    for index, head in enumerate(whole):
        torch.testing.assert_close(gathered[index].weight_VH, head.weight[first:last], rtol=0, atol=0)
    return [heads.logp_at(index, hidden, ids, temperature=1.3) for index in range(2)]


if __name__ == "__main__":
    case_ranks(log_probabilities)
