"""Build one rank's side of `distill check` from the parts of a run, and run it; `self_check` has the questions."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from typing import IO

import psutil
import torch
from rich.markup import escape

from distill_cli.config.schema import Config, Dtype, Precision, TeacherModel
from distill_cli.config.variation import override
from distill_cli.engines.base import Teacher
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import read_config, tensors
from distill_cli.parallel.mesh import Parallel, init_parallel
from distill_cli.ranks.build_engines import build_engines, build_teacher
from distill_cli.ranks.build_prompts import build_tokenizer
from distill_cli.ranks.build_source import build_order, build_planner, build_worker
from distill_cli.ranks.build_trainer import (
    build_loss,
    build_saver,
    build_student,
    build_trainable,
    close,
    count_steps,
    pick_device,
)
from distill_cli.ranks.self_check import EXACT, MASSES, ROUNDED, Finding, SelfCheck
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.recorded_steps import RecordedSteps
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.student.model import Student
from distill_cli.terminal.console import Console

CHECKED_TOKENS = 64
"""Most tokens of an answer: enough to measure, few enough to be quick."""


def check_rank(run: RunDir, console: IO[str]) -> None:
    """Run a rank's part of `distill check`; the main rank writes the findings to outcome.json. A collective."""
    resolved = ResolvedRun.read(run)
    config, loss = resolved.config, build_loss(resolved.config)
    parallel = init_parallel(device=pick_device(), **asdict(config.mesh))
    tokenizer = build_tokenizer(resolved)
    order, planner = build_order(resolved, tokenizer, parallel), build_planner(config, parallel)
    engines = build_engines(with_student_as_teacher(resolved), topk=num_scored(resolved))
    if isinstance(order, RecordedSteps) or engines.sampler is None or engines.teacher is None:
        raise ConfigError("rollout.replay: distill check needs both engines; leave it out")
    student = build_student(resolved, loss, parallel)
    trainable = build_trainable(resolved, student, num_steps=count_steps(config, order), device=parallel.device)
    stages = Stages(parallel, StopFlag())
    worker = build_worker(resolved, tokenizer, stages, engines.sampler, student, trainable)
    sampling = replace(worker.sampling, max_new_tokens=min(worker.sampling.max_new_tokens, CHECKED_TOKENS))
    screen = Console(file=console, highlight=False, soft_wrap=not console.isatty())

    def scoring_by(teacher: Teacher) -> ScoringWorker:
        return ScoringWorker(teacher, planner, stages, student.merged_eos_ids)

    def report(finding: Finding) -> None:
        screen.print(finding_line(finding))
        if parallel.is_main:
            run.beat("check")

    check = SelfCheck(
        config=config,
        parallel=parallel,
        prompts=order.batch(0),
        worker=replace(worker, sampling=sampling),
        own_scoring=scoring_by(engines.teacher),
        make_scoring=lambda: scoring_by(build_teacher(resolved, topk=num_scored(resolved))),
        student=student,
        trainable=trainable,
        loss=loss,
        load_teacher=lambda: load_teacher(resolved, parallel),
        saver=build_saver(config, run, trainable),
        checkpoints=run.checkpoints,
        limits=EXACT if is_exact(config, parallel.device) else ROUNDED,
        report=report,
    )
    is_good = check.run()
    if parallel.is_main:
        findings = [asdict(finding) for finding in check.findings]
        write_json(run.outcome, {"state": "finished", "is_good": is_good, "findings": findings})
    close(engines)


def with_student_as_teacher(resolved: ResolvedRun) -> ResolvedRun:
    """Return the run with the student as its own teacher."""
    student = resolved.config.model.student
    teacher = TeacherModel(path=student.path, revision=student.revision, dtype=student.dtype)
    return replace(resolved, config=override(resolved.config, {"model.teacher": teacher}), teacher=resolved.student)


def finding_line(finding: Finding) -> str:
    """Return a finding as the user sees it, in Rich's markup."""
    mark = {True: "[green]ok  [/green]", False: "[red]bad [/red]", None: "[dim]--  [/dim]"}[finding.is_good]
    fix = f"\n     fix: {escape(finding.fix)}" if finding.is_good is False else ""
    return f"{mark} {finding.what:<48} {escape(finding.answer)}{fix}"


def num_scored(resolved: ResolvedRun) -> int:
    """Return the size of the teacher's top-k in a check: the largest of MASSES, or `loss.topk` if larger."""
    vocab_size = resolved.vocabulary.limit or resolved.student.vocab_size
    return max(resolved.config.loss.topk, min(MASSES[-1], vocab_size))


def is_exact(config: Config, device: torch.device) -> bool:
    """Return whether trainer and engines all compute in float32; vLLM's attention multiplies in TF32 on GPUs."""
    dtypes = {config.model.student.dtype, config.model.teacher.dtype}
    return device.type == "cpu" and config.train.precision is Precision.fp32 and dtypes == {Dtype.float32}


def load_teacher(resolved: ResolvedRun, parallel: Parallel) -> Student:
    """Load the teacher into the trainer's own code, laid out as the student is. A collective.

    Raises:
        DistillError: it is too large, quantized or of an unsupported family.
    """
    folder = resolved.model("teacher").folder
    if resolved.config.model.teacher.quantization or "quantization_config" in read_config(folder):
        raise DistillError("the teacher is quantized")
    shards = parallel.fsdp.size() * parallel.tensor.size()
    num_bytes = 4 * sum(math.prod(shape) for _, shape in tensors(folder).values()) / shards
    if parallel.all_max(float(num_bytes > free_memory(parallel) / 2)):
        raise DistillError(f"the teacher in float32 needs {num_bytes / 2**30:.1f} GiB on each rank")
    return build_student(resolved, build_loss(resolved.config), parallel, role="teacher")


def free_memory(parallel: Parallel) -> float:
    """Return the bytes that are free for a rank, on its GPU or of its share of the host."""
    if parallel.device.type == "cuda":
        return float(torch.cuda.mem_get_info(parallel.device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
