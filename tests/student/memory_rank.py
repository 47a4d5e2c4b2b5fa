"""The ranks of `measured_memory.measure`: what optimizer steps on made-up rollouts allocate, by torch's own account.

`forked.run_cases` starts them.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.losses.teacher_chunk import Support
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.pack import MicroBatch, micro_batches, plan_batch
from distill_cli.student import attention
from distill_cli.student.adapters import add_adapters
from distill_cli.student.model import Checkpointing, Student, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.types import Example, ModelHead, OwnText, Prompt, Rollout, Sample, TeacherScores
from tests.student.forked import case_ranks

MARK = "mark: "
OF_SIZE = {4: torch.float32, 2: torch.bfloat16}


def mark(name: str) -> None:
    with record_function(MARK + name):
        pass


class Settled:
    """An FSDP collective that returns when gloo's threads, too, have let its tensors go.

    The account is this thread's: what another thread is last to free would count as held for ever.
    """

    def __init__(self, collective: Callable[..., None]) -> None:
        self.collective = collective

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op=None, async_op=False) -> None:
        tensors = (output_tensor, input_tensor)
        before = [tensor._use_count() for tensor in tensors]
        self.collective(*tensors, group=group, **({} if op is None else {"op": op}))
        while any(tensor._use_count() > count for tensor, count in zip(tensors, before, strict=True)):
            time.sleep(1e-4)


def live_bytes() -> int:
    """Return the bytes of all tensors that this process can reach."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter, DTensor):
            tensor = thing._local_tensor if isinstance(thing, DTensor) else thing
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def run(case: dict, parallel: Parallel) -> int:
    """Two optimizer steps; the second is the one that counts, since the optimizer's state is there.

    Returns the bytes that are held when it begins.
    """
    mark("start")
    student = build_student(
        case["model"],
        parallel,
        bf16=case["precision"] == "bf16",
        checkpointing=case["activation_checkpointing"],
        lora_rank=case["lora"],
        support=case["support"],
    )
    if case["teachers"]:
        student.heads = made_up_heads(case["teachers"], case["model"]["vocab_size"], parallel)
    for module in student.modules():
        if isinstance(module, FSDPModule) and parallel.device.type == "cpu":
            module.set_custom_all_gather(Settled(dist.all_gather_single))
            module.set_custom_reduce_scatter(Settled(dist.reduce_scatter_single))
    optimizer = build_optimizer(student, lr=2e-5)
    schedule = build_schedule(optimizer, num_updates=10)
    student.register_forward_pre_hook(lambda *_: mark("forward"))
    student.decoder.register_forward_hook(lambda *_: mark("head"))
    student.register_forward_hook(lambda *_: mark("backward"))
    optimizer.register_step_pre_hook(lambda *_: mark("optimizer"))
    batches = made_up_batches(
        vocab=case["model"]["vocab_size"],
        topk=case["topk"],
        length=case["tokens"] // 2,
        number=2 * case["micro_batches"] * parallel.data_size,
        max_tokens=case["tokens"],
        parallel=parallel,
        rows=case["rows"],
        teacher=next(iter(case["teachers"]), None),
    )
    for _ in range(2):
        begin = live_bytes()
        mark("step")
        optimizer_step(student, optimizer, schedule, batches, max_grad_norm=1.0, parallel=parallel)
    mark("end")
    return begin


def build_student(
    model: dict[str, Any],
    parallel: Parallel,
    *,
    bf16: bool,
    checkpointing: Checkpointing,
    compile: bool = False,
    lora_rank: int | None = None,
    support: Support = "teacher",
) -> Student:
    """A student of random weights, made on its device and laid out over the mesh."""
    with parallel.device:
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), attn_implementation=attention.NAME).train()
    if lora_rank:
        add_adapters(lm, rank=lora_rank, bf16=bf16)
        for module in lm.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.is_meta:
                module.to_empty(device=parallel.device)
                torch.nn.init.normal_(module.weight, std=0.02)
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed"), support=support), parallel=parallel)
    wrap(student, parallel, bf16=bf16, checkpointing=checkpointing, compile=compile)
    return student


def made_up_heads(teachers: Sequence[tuple[int, ...]], vocab: int, parallel: Parallel) -> TeacherHeads:
    """Heads of random weights."""
    heads = TeacherHeads(parallel, vocab, vocab // parallel.tensor.size())
    for index, (hidden, size, *own_ids) in enumerate(teachers):
        if own_ids:
            heads.firsts[index] = torch.arange(own_ids[0]) % vocab

        def rows(one: tuple[int, int], hidden: int = hidden, dtype: torch.dtype = OF_SIZE[size]) -> ModelHead:
            return ModelHead(torch.randn(one[1] - one[0], hidden, dtype=dtype))

        heads.read(index, rows)
    return heads


def made_up_batches(
    *,
    vocab: int,
    topk: int,
    length: int,
    number: int,
    max_tokens: int,
    parallel: Parallel,
    rows: bool = False,
    teacher: tuple[int, ...] | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of `number` sequences of random tokens, all of them response but for the first.

    Args:
        rows: make each sequence a row of its own.
        teacher: `HiddenSize` of hidden states that take the place of a top-k.
    """
    rollouts, scores = [], {}
    for index in range(number):
        ids = torch.randint(0, vocab, (length,)).tolist()
        first = torch.randint(0, vocab, (length - 1, 1))
        top = ((first + torch.arange(topk) * (vocab // topk)) % vocab).int()
        scores[index] = TeacherScores.of_topk(top, torch.full(top.shape, -5.0), torch.full((length - 1,), -5.0))
        if teacher is not None:
            hidden = torch.randn(length - 1, teacher[0], dtype=OF_SIZE[teacher[1]])
            text = replace(OwnText.plain(len(hidden)), token_ids=top[:, 0]) if teacher[2:] else None
            scores[index] = TeacherScores.of_hidden(hidden, text)
        sample = Sample(ids[1:], [-1.0] * (length - 1), "stop")
        rollouts.append(Rollout(Prompt(index, ids[:1], Example("q")), sample))
    plan = plan_batch(
        [length] * number,
        num_ranks=parallel.data_size,
        max_tokens=max_tokens,
        packing=not rows,
        multiple=parallel.length_multiple,
    )
    return micro_batches(plan, rollouts, scores, parallel=parallel)


def timeline(events: Sequence[object]) -> list[tuple[str, int, int]]:
    """(mark, bytes live then, most bytes live from there to the next mark) in order."""
    found, live = [], 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            if found:
                found[-1][2] = max(found[-1][2], live)
        elif event.name().startswith(MARK):
            found.append([event.name().removeprefix(MARK), live, live])
    return [tuple(entry) for entry in found]


def peak_on_gpu(case: dict) -> int:
    """Bytes that a lone rank's step takes at its most, by CUDA's allocator. Not run so far."""
    attention.register()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(case, layout(**case["mesh"], device=torch.device("cuda")))
        return torch.cuda.max_memory_allocated() - before
    finally:
        dist.destroy_process_group()


def measure(case: dict) -> tuple[int, list[tuple[str, int, int]]]:
    """Bytes held when the second step begins, and the timeline."""
    parallel = layout(**case["mesh"], device=torch.device("cpu"))
    gc.collect()  # what is left of the case before would be freed in this one's account
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        begin = run(case, parallel)
    return begin, timeline(profiled.profiler.kineto_results.events())


if __name__ == "__main__":
    case_ranks(measure)
