"""Training steps of a student of 1.7B with random weights: tokens a second, MFU, peak memory, where the time goes.

Every token after a sequence's prompt is a response. MFU is against the card's own product of large bfloat16 matrices,
measured here, and counts neither attention's operations nor what checkpointing computes again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from distill_cli import memory
from distill_cli.config.schema import Checkpointing, MeshConfig, Precision, TrainConfig
from distill_cli.losses.divergence import DistillLoss
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.pack import MicroBatch, micro_batches, plan_batch
from distill_cli.student import attention
from distill_cli.student.flops import train_flops
from distill_cli.student.model import Student, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores
from gpu_stages.figures import Stage
from gpu_stages.shapes import student_shape
from gpu_stages.timing import median_seconds, most_expensive, product_flops

CASES = {
    "full checkpointing": (Checkpointing.full, False),
    "selective checkpointing": (Checkpointing.selective, False),
    "selective, compiled": (Checkpointing.selective, True),
    "full, compiled": (Checkpointing.full, True),
}
PROFILED = "selective checkpointing"
REHEARSED = ("full checkpointing", "selective checkpointing", "selective, compiled")
"""On a CPU a compiler takes longer than all the rest."""


def run(stage: Stage) -> None:
    length, micro_batch_tokens, num_sequences, topk = (64, 128, 4, 8) if stage.rehearse else (4096, 16_384, 8, 64)
    backend = "gloo" if stage.rehearse else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel = layout(MeshConfig(), device=torch.device(stage.device))
    attention.register()
    shape = student_shape(rehearse=stage.rehearse)
    peak_flops = product_flops(stage.device, size=256 if stage.rehearse else 8192)
    stage.record("a product of two large bfloat16 matrices", peak_flops / 1e12, "TFLOP/s")
    batches = make_batches(
        shape, length=length, number=num_sequences, topk=topk, max_tokens=micro_batch_tokens, parallel=parallel
    )
    num_response = sum(batch.num_response_tokens for batch in batches)
    for name, (checkpointing, compiled) in CASES.items():
        if stage.rehearse and name not in REHEARSED:
            continue
        settings = TrainConfig(activation_checkpointing=checkpointing, precision=Precision.bf16, compile=compiled)
        step, student = build_step(shape, settings, batches, parallel=parallel)
        flops = train_flops(student, num_tokens=num_sequences * length, num_response_tokens=num_response)
        if stage.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(step, device=stage.device, rounds=1 if stage.rehearse else 4, warmup=2)
        stage.record(f"{name}: a step", seconds, "s")
        stage.record(f"{name}: tokens", num_sequences * length / seconds, "tokens/s")
        stage.record(f"{name}: MFU", flops / seconds / peak_flops * 100, "%", at_least=45)
        predicted = predicted_bytes(
            shape, student, checkpointing, tokens=micro_batch_tokens, topk=topk, num_batches=len(batches), stage=stage
        )
        if stage.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            stage.record(f"{name}: peak memory", peak / 2**30, "GiB")
            stage.record(f"{name}: peak that plan predicts", predicted / 2**30, "GiB")
            if not compiled:  # the prediction says of itself that a compiled layer keeps less
                stage.record(f"{name}: prediction off by", abs(predicted / peak - 1) * 100, "%", at_most=15)
        if name == PROFILED:
            stage.table("kernels", most_expensive(step, device=stage.device))
        del step, student
        gc.collect()
        if stage.device == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def build_step(
    shape: dict[str, Any], settings: TrainConfig, batches: list[MicroBatch], *, parallel: Parallel
) -> tuple[Callable[[], object], Student]:
    """One optimizer update over `batches`, to be called again and again, and its student."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with parallel.device:
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation=attention.NAME).train()
    student = Student(lm, loss=DistillLoss(kl_type="mixed"), temperature=1.0, parallel=parallel)
    wrap(student, parallel, settings)
    optimizer = build_optimizer(student, settings)
    schedule = build_schedule(optimizer, settings, num_steps=100)

    def step() -> None:
        result = optimizer_step(student, optimizer, schedule, batches, max_grad_norm=1.0, parallel=parallel)
        assert result.is_finite, (result.loss, result.grad_norm)

    return step, student


def make_batches(
    shape: dict[str, Any], *, length: int, number: int, topk: int, max_tokens: int, parallel: Parallel
) -> list[MicroBatch]:
    """Sequences of random tokens, an eighth of each a prompt; the teacher's top-k are random distinct ids."""
    generator, vocab, start = torch.Generator().manual_seed(0), shape["vocab_size"], length // 8
    num_response = length - start
    rollouts = []
    for index in range(number):
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        first = torch.randint(vocab, (num_response, 1), generator=generator)
        topk_ids = ((first + torch.arange(topk) * (vocab // topk)) % vocab).int()
        topk_logp = torch.randn(num_response, topk + 1, generator=generator).log_softmax(-1)[:, :-1].contiguous()
        scores = TeacherScores(topk_ids, topk_logp, topk_logp[:, 0].contiguous())
        sample = Sample(ids[start:], [-1.0] * num_response, "length")
        rollouts.append(Rollout(Prompt(index, ids[:start], Example("q")), sample, scores=scores))
    plan = plan_batch([length] * number, num_ranks=1, max_tokens=max_tokens, multiple=parallel.length_multiple)
    return micro_batches(plan, rollouts, topk=topk, parallel=parallel)


def predicted_bytes(
    shape: dict[str, Any],
    student: Student,
    checkpointing: Checkpointing,
    *,
    tokens: int,
    topk: int,
    num_batches: int,
    stage: Stage,
) -> int:
    """What `distill plan` would say of the trainer's peak."""
    shapes = {name: tuple(param.shape) for name, param in student.lm.named_parameters()}
    step = memory.Step(
        tokens=tokens,
        topk=topk,
        micro_batches=num_batches,
        bf16=True,
        checkpointing=checkpointing,
        on_gpu=not stage.rehearse,
    )
    return max(moment.total for moment in memory.trainer_moments(memory.shape_of(shape, shapes), step))
