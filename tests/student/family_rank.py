"""One family's student after five updates, against plain transformers on documents alone.

`test_families.py` and `scripts/check_families.py` run it; `forked.run_cases` starts the ranks.
"""

import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from distill_cli.errors import ConfigError
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.parallel.mesh import layout
from distill_cli.rollout.pack import micro_batches, plan_batch
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.student.weights import load_weights
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores
from tests.families import FAMILIES, VOCAB, make_model, save_model
from tests.student.forked import case_ranks

TOPK, NUM_STEPS, MAX_NORM = 8, 5, 0.05
TRAINING = {"lr": 1e-2, "eps": 1e-5}


def make_step(step: int) -> tuple[list[Rollout], list[TeacherScores]]:
    generator = torch.Generator().manual_seed(step)
    rollouts, scores = [], []
    for index, (num_prompt, num_response) in enumerate([(5, 9), (1, 30), (12, 3), (3, 1), (20, 25)]):
        ids = torch.randint(2, VOCAB - 8, (num_prompt + num_response,), generator=generator).tolist()
        logp, top = torch.randn(num_response, VOCAB, generator=generator).mul(2).log_softmax(-1).topk(TOPK)
        sample = Sample(ids[num_prompt:], [-1.0] * num_response, "stop")
        rollouts.append(Rollout(Prompt(index, ids[:num_prompt], Example("q")), sample))
        scores.append(TeacherScores.of_topk(top.int(), logp, logp[:, 0]))
    return rollouts, scores


def train_plainly(lm: PreTrainedModel, loss: DistillLoss) -> tuple[list[float], list[float]]:
    """Five updates with dense logits, a document at a time."""
    optimizer = build_optimizer(lm, **TRAINING)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        rollouts, scores = make_step(step)
        total = sum(len(rollout.sample.token_ids) for rollout in rollouts)
        value = 0.0
        for rollout, score in zip(rollouts, scores, strict=True):
            first = len(rollout.prompt.token_ids)
            logits = lm(input_ids=torch.tensor([rollout.token_ids]), use_cache=False).logits[0, first - 1 : -1]
            logp = logits.double().log_softmax(-1)
            ids = score.topk_ids.long()
            rest = logp.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            classes = torch.cat([logp.gather(1, ids), rest], -1)
            entropy = -(logp.exp() * logp).sum(-1)
            part = loss(score.topk_logp.double(), classes, entropy).sum() / total
            part.backward()
            value += float(part)
        norms.append(float(torch.nn.utils.clip_grad_norm_(lm.parameters(), MAX_NORM)))
        losses.append(value)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def train_student(case: dict, folder: Path, loss: DistillLoss) -> tuple[list[float], list[float], dict]:
    mesh = {name: case.get(name, 1) for name in ("tensor", "context", "expert")}
    parallel = layout(**mesh, sequence_parallel=mesh["tensor"] > 1, device=torch.device("cpu"))
    lm, published = build_lm(folder)
    student = Student(lm, objective=Objective(loss), parallel=parallel, published=published)
    wrap(student, parallel, bf16=case.get("bf16", False), checkpointing=case.get("checkpointing", "none"))
    load_weights(lm, published, device=torch.device("cpu"))
    optimizer = build_optimizer(student, **TRAINING)
    schedule = build_schedule(optimizer, warmup_updates=0, num_updates=NUM_STEPS)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        rollouts, scores = make_step(step)
        rows = FAMILIES[case["family"]].rows or case.get("rows", False)
        plan = plan_batch(
            [len(rollout.token_ids) for rollout in rollouts], num_ranks=parallel.data_size, max_tokens=100,
            packing=not rows, multiple=parallel.length_multiple,
        )  # fmt: skip
        batches = micro_batches(plan, rollouts, dict(enumerate(scores)), parallel=parallel)
        result = optimizer_step(student, optimizer, schedule, batches, max_grad_norm=MAX_NORM, parallel=parallel)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    params = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in lm.named_parameters()}
    return losses, norms, params


def differences(case: dict) -> dict[str, float]:
    """Largest relative differences of loss, gradient norm and parameters (by their norms)."""
    loss = DistillLoss(kl_type="mixed")
    with tempfile.TemporaryDirectory() as name:
        names = [name]
        dist.broadcast_object_list(names)
        folder = Path(names[0])
        if dist.get_rank() == 0:
            save_model(make_model(case["family"], **case.get("config", {})), folder)
        dist.barrier()
        losses, norms, params = train_student(case, folder, loss)
        if dist.get_rank() > 0:  # rank 0 compares
            return {}
        kind = AutoModelForCausalLM if FAMILIES[case["family"]].text is None else AutoModelForImageTextToText
        lm = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        expected_losses, expected_norms = train_plainly(lm.eval(), loss)
    expected = {name: param for name, param in lm.named_parameters() if name in params}
    assert params.keys() == expected.keys(), params.keys() ^ expected.keys()
    assert FAMILIES[case["family"]].text or len(expected) == len(list(lm.parameters()))

    def relative(values: list[float], others: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True))

    def by_norm(name: str) -> float:
        a, b = params[name].detach().double(), expected[name].detach().double()
        return float((a - b).norm() / b.norm().clamp_min(1e-3))

    worst = max(expected, key=by_norm)
    return {
        "loss": relative(losses, expected_losses),
        "grad_norm": relative(norms, expected_norms),
        "params": by_norm(worst),
        "worst": worst,
    }


def run(case: dict) -> dict:
    """The differences, or why the family cannot be cut so, or what failed: on all ranks alike, or the others wait."""
    try:
        return differences(case)
    except ConfigError as error:
        return {"refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


if __name__ == "__main__":
    case_ranks(run)
