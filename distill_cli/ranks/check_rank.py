"""Builds one rank's side of `distill check`, and runs it: the parts are those of a run, the questions `selfcheck`'s."""

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
from distill_cli.engines.companion import CompanionScorer
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.models.model_files import read_config, tensors
from distill_cli.parallel.mesh import Parallel, init_parallel
from distill_cli.ranks.build_engines import build_engines, build_scorer
from distill_cli.ranks.build_prompts import build_tokenizer
from distill_cli.ranks.build_trainer import build_loss, build_trainer, close, pick_device, wrap_and_load
from distill_cli.ranks.self_check import MASSES, Finding, Limits, SelfCheck
from distill_cli.resolved import ResolvedRun
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

    def of_the_student(found: ResolvedRun) -> tuple[Sampler, Scorer | CompanionScorer]:
        student = found.config.model.student
        model = TeacherModel(path=student.path, revision=student.revision, dtype=student.dtype)
        as_teacher = replace(found, config=override(found.config, {"model.teacher": model}), teacher=found.student)
        return build_engines(as_teacher, topk=num_scored(found))

    trainer, trainable = build_trainer(run, console, found, parallel, tokenizer, make_engines=of_the_student)
    sampling = trainer.engines.sampling
    trainer.engines.sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, CHECKED_TOKENS))
    show = Console(file=console, highlight=False, soft_wrap=not console.isatty())

    check = SelfCheck(
        trainer=trainer,
        trainable=trainable,
        loss=build_loss(config),
        make_teacher=lambda: build_scorer(found, topk=num_scored(found)),
        load_teacher=lambda: load_teacher(found, parallel),
        checkpoints=run.checkpoints,
        limits=Limits.of(exact=is_exact(config, parallel.device)),
        report=lambda finding: show.print(finding_line(finding)),
    )
    is_good = check.run()
    if parallel.is_main:
        findings = [asdict(finding) for finding in check.findings]
        write_json(run.outcome, {"state": "finished", "is_good": is_good, "findings": findings})
    close(trainer)


def finding_line(finding: Finding) -> str:
    """As the user sees it, in Rich's markup."""
    mark = {True: "[green]ok  [/green]", False: "[red]bad [/red]", None: "[dim]--  [/dim]"}[finding.is_good]
    fix = f"\n     fix: {escape(finding.fix)}" if finding.is_good is False else ""
    return f"{mark} {finding.what:<48} {escape(finding.found)}{fix}"


def num_scored(found: ResolvedRun) -> int:
    """Tokens of the teacher that a check looks at: the largest of MASSES, or `loss.topk` if that is more."""
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
        one_class=found.vocabulary.merged_eos_ids,
    )
    return wrap_and_load(teacher, folder, config, parallel)


def free_memory(parallel: Parallel) -> float:
    """Bytes that a rank may take, of its GPU or of its share of the host."""
    if parallel.device.type == "cuda":
        return float(torch.cuda.mem_get_info(parallel.device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
