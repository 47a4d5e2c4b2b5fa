"""Builds one rank's side of `distill check` of the parts of a run, and runs it; `self_check` has the questions."""

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
from distill_cli.errors import DistillError
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
    wrap_and_load,
)
from distill_cli.ranks.self_check import MASSES, Finding, Limits, SelfCheck
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.student.model import Student, build_lm
from distill_cli.terminal.console import Console

CHECKED_TOKENS = 64
"""Tokens of an answer, at most: enough to see, few enough to wait for."""


def check_rank(run: RunDir, console: IO[str]) -> None:
    """A rank's part in `distill check`. Every rank calls it; the main one leaves the findings in outcome.json."""
    found = ResolvedRun.read(run)
    config = found.config
    parallel = init_parallel(device=pick_device(), **asdict(config.mesh))
    tokenizer = build_tokenizer(found)
    order, planner = build_order(found, tokenizer, parallel), build_planner(config, parallel)
    engines = build_engines(of_the_student(found), topk=num_scored(found))
    student = build_student(found, build_loss(config), parallel)
    trainable = build_trainable(found, student, num_steps=count_steps(config, order), device=parallel.device)
    stages = Stages(parallel, StopFlag())
    worker = build_worker(found, tokenizer, stages, sampler=engines.sampler, student=student, trainable=trainable)
    sampling = replace(worker.sampling, max_new_tokens=min(worker.sampling.max_new_tokens, CHECKED_TOKENS))
    show = Console(file=console, highlight=False, soft_wrap=not console.isatty())

    def scoring_by(teacher: Teacher) -> ScoringWorker:
        return ScoringWorker(teacher, planner, stages, student.merged_eos_ids)

    def report(finding: Finding) -> None:
        show.print(finding_line(finding))
        if parallel.is_main:
            run.beat("check")

    check = SelfCheck(
        config=config,
        parallel=parallel,
        prompts=order.batch(0),
        worker=replace(worker, sampling=sampling),
        own_scoring=scoring_by(engines.teacher),
        make_scoring=lambda: scoring_by(build_teacher(found, topk=num_scored(found))),
        student=student,
        trainable=trainable,
        loss=build_loss(config),
        load_teacher=lambda: load_teacher(found, parallel),
        saver=build_saver(config, run, trainable),
        checkpoints=run.checkpoints,
        limits=Limits.of(exact=is_exact(config, parallel.device)),
        report=report,
    )
    is_good = check.run()
    if parallel.is_main:
        findings = [asdict(finding) for finding in check.findings]
        write_json(run.outcome, {"state": "finished", "is_good": is_good, "findings": findings})
    close(engines)


def of_the_student(found: ResolvedRun) -> ResolvedRun:
    """Return the run with the student as its own teacher."""
    student = found.config.model.student
    teacher = TeacherModel(path=student.path, revision=student.revision, dtype=student.dtype)
    return replace(found, config=override(found.config, {"model.teacher": teacher}), teacher=found.student)


def finding_line(finding: Finding) -> str:
    """As the user sees it, in Rich's markup."""
    mark = {True: "[green]ok  [/green]", False: "[red]bad [/red]", None: "[dim]--  [/dim]"}[finding.is_good]
    fix = f"\n     fix: {escape(finding.fix)}" if finding.is_good is False else ""
    return f"{mark} {finding.what:<48} {escape(finding.found)}{fix}"


def num_scored(found: ResolvedRun) -> int:
    """Tokens of the teacher's distribution that a check looks at: the largest of MASSES, or `loss.topk` if larger."""
    return max(found.config.loss.topk, min(MASSES[-1], found.vocabulary.limit or found.student.vocab_size))


def is_exact(config: Config, device: torch.device) -> bool:
    """Whether trainer and engines all compute in float32. On GPUs vLLM's attention multiplies it in TF32."""
    if device.type != "cpu":
        return False
    dtypes = {config.model.student.dtype, config.model.teacher.dtype}
    return config.train.precision is Precision.fp32 and dtypes == {Dtype.float32}


def load_teacher(found: ResolvedRun, parallel: Parallel) -> Student:
    """The teacher laid out as the student is. A collective.

    Raises:
        DistillError: it cannot be, for the reason given: too large, of another family, quantized.
    """
    config, model, folder = found.config, found.config.model, found.model("teacher").folder
    if model.teacher.quantization or "quantization_config" in read_config(folder):
        raise DistillError("the teacher is quantized")
    num_bytes = 4 * sum(math.prod(shape) for _, shape in tensors(folder).values())
    shards = parallel.fsdp.size() * parallel.tensor.size()
    free = free_memory(parallel) / 2
    if parallel.all_max(float(num_bytes / shards > free)):
        raise DistillError(f"the teacher in float32 needs {num_bytes / shards / 2**30:.1f} GiB on each rank")
    teacher = Student(
        build_lm(folder, trust_remote_code=model.trust_remote_code),
        loss=build_loss(config),
        temperature=config.loss.temperature,
        parallel=parallel,
        merged_eos_ids=found.vocabulary.merged_eos_ids,
    )
    return wrap_and_load(teacher, folder, config, parallel)


def free_memory(parallel: Parallel) -> float:
    """Bytes that a rank may take, of its GPU or of its share of the host."""
    if parallel.device.type == "cuda":
        return float(torch.cuda.mem_get_info(parallel.device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
