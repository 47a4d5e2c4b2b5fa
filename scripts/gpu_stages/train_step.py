"""Measure optimizer updates of a 1.7B student with random weights: tokens/s, MFU, peak memory, kernels.

Every token but a sequence's first is a response token. MFU is relative to a product of two large bfloat16 matrices on
the same card, and counts neither attention's operations nor recomputation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist

from distill_cli.config.schema import Checkpointing, MeshConfig, Precision, TrainConfig
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.pack import MicroBatch
from distill_cli.student import attention
from distill_cli.student.flops import train_flops
from distill_cli.student.model import Student
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from gpu_stages.figures import Stage
from gpu_stages.shapes import student_shape
from gpu_stages.timing import median_seconds, most_expensive, product_flops
from tests.student.measured_memory import Case, predict
from tests.student.memory_rank import build_student, made_up_batches

CASES = {
    "full checkpointing": (Checkpointing.full, False),
    "selective checkpointing": (Checkpointing.selective, False),
    "selective, compiled": (Checkpointing.selective, True),
    "full, compiled": (Checkpointing.full, True),
}
PROFILED = "selective checkpointing"
REHEARSED = ("full checkpointing", "selective checkpointing", "selective, compiled")
"""Fewer cases on a CPU, where compiling takes longer than everything else."""


def run(stage: Stage) -> None:
    backend = "gloo" if stage.rehearse else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    attention.register()
    parallel = layout(MeshConfig(), device=torch.device(stage.device))
    peak_flops = product_flops(stage.device, size=256 if stage.rehearse else 8192)
    stage.record("a product of two large bfloat16 matrices", peak_flops / 1e12, "TFLOP/s")
    for name, (checkpointing, compiled) in CASES.items():
        if not stage.rehearse or name in REHEARSED:
            measure(stage, name, checkpointing, compiled, parallel=parallel, peak_flops=peak_flops)
            gc.collect()
            if stage.device == "cuda":
                torch.cuda.empty_cache()
    dist.destroy_process_group()


def measure(
    stage: Stage, name: str, checkpointing: Checkpointing, compiled: bool, *, parallel: Parallel, peak_flops: float
) -> None:
    """Measure one case, with two micro-batches per update."""
    length, micro_batch_tokens, topk = (64, 128, 8) if stage.rehearse else (4096, 16_384, 64)
    num_tokens = 2 * micro_batch_tokens
    case = Case(
        student_shape(rehearse=stage.rehearse),
        activation_checkpointing=checkpointing.value,
        precision="bf16",
        tokens=micro_batch_tokens,
        topk=topk,
        micro_batches=2,
    )
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = TrainConfig(activation_checkpointing=checkpointing, precision=Precision.bf16, compile=compiled)
    student = build_student(case.model, settings, parallel)
    batches = made_up_batches(
        vocab=case.model["vocab_size"],
        topk=topk,
        length=length,
        number=num_tokens // length,
        max_tokens=micro_batch_tokens,
        parallel=parallel,
    )
    update = updater(student, settings, batches, parallel=parallel)
    if stage.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(update, device=stage.device, rounds=1 if stage.rehearse else 4, warmup=2)
    num_response = sum(batch.num_response_tokens for batch in batches)
    flops = train_flops(student, num_tokens=num_tokens, num_response_tokens=num_response)
    stage.record(f"{name}: an update", seconds, "s")
    stage.record(f"{name}: tokens", num_tokens / seconds, "tokens/s")
    stage.record(f"{name}: MFU", flops / seconds / peak_flops * 100, "%", at_least=45)
    if stage.device == "cuda":
        peak, predicted = torch.cuda.max_memory_allocated(), predict(case, on_gpu=True)["peak"]
        stage.record(f"{name}: peak memory", peak / 2**30, "GiB")
        stage.record(f"{name}: peak that plan predicts", predicted / 2**30, "GiB")
        if not compiled:  # compiled layers keep less than is predicted, see `distill_cli.memory`
            stage.record(f"{name}: prediction off by", abs(predicted / peak - 1) * 100, "%", at_most=15)
    if name == PROFILED:
        stage.table("kernels", most_expensive(update, device=stage.device))


def updater(
    student: Student, settings: TrainConfig, batches: list[MicroBatch], *, parallel: Parallel
) -> Callable[[], None]:
    """Return a function that does one optimizer update over `batches`."""
    optimizer = build_optimizer(student, settings)
    schedule = build_schedule(optimizer, settings, num_updates=100)

    def update() -> None:
        result = optimizer_step(student, optimizer, schedule, batches, max_grad_norm=1.0, parallel=parallel)
        assert result.is_finite, (result.loss, result.grad_norm)

    return update
