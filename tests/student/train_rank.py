"""The ranks of `layouts.train`: five optimizer steps on made-up rollouts for each layout; and what they come to.

`forked.run_cases` starts them.
"""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.parallel.mesh import layout
from distill_cli.rollout.pack import micro_batches, plan_batch
from distill_cli.student import attention
from distill_cli.student.adapters import add_adapters, is_adapter, plain_name
from distill_cli.student.model import Student, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores
from tests.student.forked import case_ranks

VOCAB, TOPK, NUM_STEPS = 64, 8, 5


def lengths_of(kind: str, generator: torch.Generator) -> list[tuple[int, int]]:
    """(prompt, response) tokens of each sequence of a global batch."""
    number = {"ragged": 7, "few": 3, "long": 5}[kind]
    lengths = [tuple(torch.randint(1, 20, (2,), generator=generator).tolist()) for _ in range(number)]
    return [(5, 200), *lengths[1:]] if kind == "long" else lengths


def made_up_rollout(
    index: int, num_prompt: int, num_response: int, generator: torch.Generator
) -> tuple[Rollout, TeacherScores]:
    ids = torch.randint(0, VOCAB, (num_prompt + num_response,), generator=generator).tolist()
    logp, top = torch.randn(num_response, VOCAB, generator=generator).mul(2).log_softmax(-1).topk(TOPK)
    rollout = Rollout(
        Prompt(index, ids[:num_prompt], Example("q")), Sample(ids[num_prompt:], [-1.0] * num_response, "stop")
    )
    return rollout, TeacherScores.of_topk(top.int(), logp, logp[:, 0])


def made_up_model(family: str, *, tied: bool) -> PreTrainedModel:
    extra = {"sliding_window": 8} if family in ("mistral", "gemma3_text") else {}
    if family == "gemma3_text":
        extra |= {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():  # norms that differ, so that a wrong gradient of theirs shows
        for param in lm.parameters():
            param.add_(torch.randn(param.shape).mul(0.1 if param.ndim == 1 else 0.02))
    return lm.train()


def add_made_up_adapters(lm: PreTrainedModel, case: dict) -> None:
    """With values of their own, B's not 0 either: else A would have no gradient in the first step."""
    frozen = dict(lm.named_parameters())
    add_adapters(lm, rank=case["lora"], alpha=8.0, targets=case["lora_targets"], bf16=case["precision"] == "bf16")
    generator = torch.Generator().manual_seed(1)
    for name, param in list(lm.named_parameters()):
        if is_adapter(name):
            value = torch.randn(param.shape, generator=generator).mul(0.1)
            lm.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(value)
        else:
            assert plain_name(name) in frozen


def train(case: dict) -> tuple:
    mesh = {name: case[name] for name in ("tensor", "context", "replicate", "sequence_parallel")}
    parallel = layout(**mesh, device=torch.device("cpu"))
    lm = made_up_model(case["family"], tied=case["tied"])
    if case["lora"]:
        add_made_up_adapters(lm, case)
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed")), parallel=parallel)
    wrap(
        student, parallel, bf16=case["precision"] == "bf16", checkpointing=case["activation_checkpointing"],
        compile=case["compile"], cpu_offload=case["cpu_offload"],
    )  # fmt: skip
    optimizer = build_optimizer(student, lr=1e-2, eps=1e-5)
    schedule = build_schedule(optimizer, warmup_updates=0, num_updates=NUM_STEPS)
    trainable, results = Trainable(student.lm, optimizer, schedule), []
    if case["start_from"]:
        load(Path(case["start_from"]), trainable)
    for step in range(trainable.num_updates, NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        lengths = lengths_of(case["lengths"], generator)
        rollouts, scores = zip(*(made_up_rollout(i, *pair, generator) for i, pair in enumerate(lengths)), strict=True)
        plan = plan_batch(
            [sum(pair) for pair in lengths], num_ranks=parallel.data_size, max_tokens=case["micro_batch_tokens"],
            packing=case["packing"], one_row=case["context"] > 1, multiple=parallel.length_multiple,
        )  # fmt: skip
        batches = micro_batches(plan, rollouts, dict(enumerate(scores)), parallel=parallel)
        results.append(optimizer_step(student, optimizer, schedule, batches, max_grad_norm=0.05, parallel=parallel))
        if case["save_to"] and step + 1 == case["save_at"]:
            saver = Saver(RunDir(Path(case["save_to"])), trainable)
            saver.save(step + 1, {"metrics": {"train/loss": results[-1].loss}})
            saver.close()
    params = {n: p.full_tensor().detach() if isinstance(p, DTensor) else p for n, p in student.named_parameters()}
    return [r.loss for r in results], [r.grad_norm for r in results], params


if __name__ == "__main__":
    case_ranks(train)
