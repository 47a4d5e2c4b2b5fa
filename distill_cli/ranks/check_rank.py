"""Build one rank's side of `distill check` from the parts of a run, and run `self_check`."""

import math
import os
from dataclasses import asdict, replace
from itertools import chain
from typing import IO, Any

import psutil
import torch
from rich.markup import escape

from distill_cli.config.derived import needs_hidden
from distill_cli.config.schema import TeacherModel
from distill_cli.config.teachers import ONLY
from distill_cli.config.variation import override
from distill_cli.engines.base import Teacher
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import read_config, tensors
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks import build_student as parts
from distill_cli.ranks.build_engines import build_engines, build_teacher, leave
from distill_cli.ranks.build_heads import build_heads
from distill_cli.ranks.build_source import (
    Rank,
    build_order,
    build_planner,
    build_translations,
    build_worker,
    prompt_maker,
)
from distill_cli.ranks.handshakes import QUESTIONS
from distill_cli.ranks.self_check import MASSES, Finding, SelfCheck
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.score_files import RecordedSteps
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.student.model import Student
from distill_cli.terminal.console import Console
from distill_cli.tokens.translation import Translation
from distill_cli.types import Target

CHECKED_TOKENS = 64
"""Most tokens of an answer: enough to measure, few enough to be quick."""


def check_rank(run: RunDir, console: IO[str]) -> None:
    """Run a rank's part of `distill check`; the main rank writes the findings to outcome.json. A collective."""
    whole = Rank.join(run)
    names, alone = list(whole.resolved.by_teacher()), list(whole.resolved.by_teacher().values())
    order, planner = build_order(whole), build_planner(whole)
    # The other teachers are checked one by one.
    rank = replace(whole, resolved=replace(alone[0], vocabulary=whole.resolved.vocabulary))
    resolved, config, parallel = rank.resolved, rank.resolved.config, rank.parallel
    built = parts.build_model(resolved)  # before engines: vLLM changes classes of transformers
    own = with_student_as_teacher(with_masses(resolved))
    sampler, own_teachers = build_engines(own, run, untouched=built[1].untouched)
    if isinstance(order, RecordedSteps) or sampler is None or not own_teachers or own_teachers[0] is None:
        raise ConfigError("rollout.replay: distill check needs both engines; leave it out")
    student = parts.build_student(resolved, parallel, built)
    trainable = parts.build_trainable(
        resolved, student, num_steps=parts.count_steps(config, order), device=parallel.device
    )
    stages = Stages(parallel, StopFlag())
    worker = build_worker(rank, stages, sampler, student, trainable)
    sampling = worker.responder.sampling
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, CHECKED_TOKENS))
    screen = Console(file=console, highlight=False, soft_wrap=not console.isatty())

    translations = build_translations(whole.resolved)

    def scoring_by(teacher: Teacher, translation: Translation | None = None) -> ScoringWorker:
        translated = {} if translation is None else {0: translation}
        return ScoringWorker([teacher], planner, stages, student.merged_eos_ids, translations=translated)

    def of_teacher(index: int) -> dict[str, Any]:
        one, translation = alone[index], translations.get(index)
        targets: list[tuple[Target, ...]] | None = None
        wide = with_masses(one)
        if translation is not None:
            translation = replace(translation, topk=wide.config.loss.topk)
            make = prompt_maker(replace(whole, resolved=one))
            made = [make(prompt.example, prompt.index) for prompt in order.batch(0)]
            tokenizer = make.settings.teachers[0].tokenizer or whole.tokenizer
            unread = Target(token_ids=tokenizer.encode(QUESTIONS[0]))  # a prompt that is too long for this teacher
            targets = [(unread,) if prompt is None else prompt.targets for prompt in made]
        return {
            "name": names[index] if len(names) > 1 else "",
            "config": one.config,
            "make_scoring": lambda: scoring_by(build_teacher(wide, run.servers(names[index])), translation),
            "load_teacher": lambda: load_teacher(one, parallel),
            "translation": translation,
            "targets": targets,
            "vocab_size": one.vocabulary.size,
        }

    check = SelfCheck(
        parallel=parallel,
        prompts=[replace(prompt, targets=(Target(),)) for prompt in order.batch(0)],
        worker=replace(worker, responder=replace(worker.responder, sampling=sampling)),
        own_scoring=scoring_by(own_teachers[0]),
        student=student,
        trainable=trainable,
        saver=parts.build_saver(config, run, trainable),
        checkpoints=run.checkpoints,
        heads=build_heads(rank, student) if needs_hidden(config) else None,
        **of_teacher(0),
    )
    others = (replace(check, **of_teacher(index)).run_other_teacher() for index in range(1, len(alone)))
    findings = []
    for finding in chain(check.run(), *others):
        findings.append(asdict(finding))
        screen.print(finding_line(finding))
        if parallel.is_main:
            run.beat("check")
    if parallel.is_main:
        is_good = all(finding["is_good"] is not False for finding in findings)
        write_json(run.outcome, {"state": "finished", "is_good": is_good, "findings": findings})
    leave()


def with_student_as_teacher(resolved: ResolvedRun) -> ResolvedRun:
    """Return the run with the student as its own teacher."""
    student = resolved.config.model.student
    teacher = TeacherModel(path=student.path, revision=student.revision, dtype=student.dtype)
    config = override(resolved.config, {"model.teacher": teacher})
    lengths = replace(resolved.lengths, teacher=resolved.lengths.student)
    return replace(resolved, config=config, teachers={ONLY: resolved.student}, lengths=lengths)


def finding_line(finding: Finding) -> str:
    """Return a finding as the user sees it, in Rich's markup."""
    mark = {True: "[green]ok  [/green]", False: "[red]bad [/red]", None: "[dim]--  [/dim]"}[finding.is_good]
    fix = f"\n     fix: {escape(finding.fix)}" if finding.is_good is False else ""
    return f"{mark} {finding.what:<48} {escape(finding.answer)}{fix}"


def with_masses(resolved: ResolvedRun) -> ResolvedRun:
    """Return the run with a top-k of the largest of MASSES, unless `loss.topk` is larger; a server may not allow it."""
    if resolved.config.model.teacher.addresses:
        return resolved
    vocab_size = resolved.vocabulary.limit or min(resolved.student.vocab_size, resolved.vocabulary.size)
    topk = max(resolved.config.loss.topk, min(MASSES[-1], vocab_size))
    return replace(resolved, config=override(resolved.config, {"loss.topk": topk}))


def load_teacher(resolved: ResolvedRun, parallel: Parallel) -> Student:
    """Load the teacher into the trainer's own code, laid out as the student is. A collective.

    Raises:
        DistillError: it is too large, quantized, on a server or of an unsupported family.
    """
    if resolved.config.model.teacher.addresses:
        raise DistillError("the teacher is on a server")
    if resolved.config.model.teacher.has_own_tokenizer:
        raise DistillError("the teacher reads other tokens")
    folder = resolved.model("teacher").folder
    if resolved.config.model.teacher.quantization or "quantization_config" in read_config(folder):
        raise DistillError("the teacher is quantized")
    shards = parallel.fsdp.size() * parallel.tensor.size()
    num_bytes = 4 * sum(math.prod(shape) for _, shape in tensors(folder).values()) / shards
    if parallel.all_max(float(num_bytes > free_memory(parallel) / 2)):
        raise DistillError(f"the teacher in float32 needs {num_bytes / 2**30:.1f} GiB on each rank")
    return parts.build_student(resolved, parallel, parts.build_model(resolved, role="teacher"), role="teacher")


def free_memory(parallel: Parallel) -> float:
    """Return the bytes that are free for a rank, on its GPU or of its share of the host."""
    if parallel.device.type == "cuda":
        return float(torch.cuda.mem_get_info(parallel.device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
