"""Build one rank's trainer from its config.yaml and run it.

The order matters: prepare the process before importing vLLM, join the process group before building an engine, and
build the same engines in the same order on every rank.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO

import torch

from distill_cli.checkpoint.saver import Trainable, load
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.derived import needs_hidden, parse_duration, scores_while_sampling
from distill_cli.config.schema import Config
from distill_cli.config.teachers import own_temperatures, teacher_names
from distill_cli.data.recorded_run import Facts, vocabulary_digest
from distill_cli.engines.base import Sampler, Teacher
from distill_cli.errors import ConfigError
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.machine.processes import StopFlag
from distill_cli.ranks import build_source as parts
from distill_cli.ranks.build_engines import Engines, build_engines, leave
from distill_cli.ranks.build_heads import OwnTokens, hold_teachers, read_moving_head, record_heads, uses_hidden
from distill_cli.ranks.build_student import (
    build_model,
    build_objective,
    build_saver,
    build_student,
    build_trainable,
    count_steps,
)
from distill_cli.ranks.handshakes import shake_hands
from distill_cli.ranks.sampler_rank import sampler_rank
from distill_cli.ranks.scorer_rank import scorer_rank
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.advantages import AdvantageSettings, advantages
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.pack import Planner
from distill_cli.rollout.remote import SamplingRanks
from distill_cli.rollout.score_files import RecordedSteps, Recorder, write_tokens
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.model import Student
from distill_cli.student.moving import MovingCopy
from distill_cli.student.weights import save_student
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.tokens.translation import Translation
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress
from distill_cli.train.token_report import ProbeReport
from distill_cli.train.trainer import Trainer
from distill_cli.train.validation import Validation, Validator
from distill_cli.types import Prompt


def run_rank(run: RunDir, console: IO[str], *, checkpoint: Path | None = None) -> None:
    """Build a rank's trainer, run it and write its outcome. A collective.

    Args:
        checkpoint: the checkpoint to continue from; None starts at step 1.
    """
    rank = parts.Rank.join(run, splits=True)
    if rank.role.name == "sample":
        sampler_rank(rank, checkpoint=checkpoint)
        return
    if rank.role.name == "score":
        scorer_rank(rank, run)
        return
    config = rank.resolved.config
    limit_s = parse_duration(config.checkpoint.must_save_by or "")
    stop = StopFlag(deadline=None if limit_s is None else read_json(run.attempt_record)["launched"] + limit_s)
    trainer = build_trainer(rank, run, console, stop=stop, checkpoint=checkpoint)
    stop.listen(signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    trainer.stages.on_stage = trainer.log.stage  # from the first stage on the launcher asks the ranks to stop
    with trainer.log.printer:
        outcome = trainer.run()
    if outcome.state == "finished" or trainer.saver is None:
        dtype = getattr(torch, config.model.student.dtype.value)
        student = trainer.student
        assert student.published is not None
        save_student(student.lm, student.published, rank.tokenizer, run.student, dtype=dtype)
    trainer.log.close()
    if trainer.sampling_ranks is not None:
        trainer.sampling_ranks.close()
    if rank.parallel.is_main:
        write_json(run.outcome, asdict(outcome))
    leave()


def build_trainer(
    rank: parts.Rank, run: RunDir, console: IO[str], *, stop: StopFlag, checkpoint: Path | None
) -> Trainer:
    """Build everything that a step works with, as at the start of a run or from a checkpoint. A collective."""
    resolved, parallel, config = rank.resolved, rank.parallel, rank.resolved.config
    # Find the user's mistakes first, before engines take their time.
    order = parts.build_order(rank)
    build_objective(config)  # the student builds its own
    validator = parts.build_validator(rank)
    if checkpoint is not None:
        check_data(checkpoint, order)
    built = build_model(resolved)  # before engines: vLLM changes classes of transformers
    bridge = rank.role.bridge
    engines = build_engines(resolved, run, should_stop=stop.is_set, untouched=built[1].untouched, bridge=bridge)
    student = build_student(resolved, parallel, built)
    num_steps = count_steps(config, order)
    trainable = build_trainable(resolved, student, num_steps=num_steps, device=parallel.device)
    copies = parts.build_copies(resolved, student.lm) if engines[1] else {}
    trainable = replace(trainable, copies=list(copies.values()))
    progress = Progress.of(load(checkpoint, trainable)) if checkpoint is not None else Progress()
    stages, planner = Stages(parallel, stop), parts.build_planner(rank)
    moving = partial(parts.moving_teacher, student=student, trainable=trainable)
    teachers = complete_teachers(resolved, engines, moving, copies)
    translations = parts.build_translations(resolved) if teachers else {}
    tokens = hold_teachers(rank, student, translations)
    teachers = shake_hands(rank, run, teachers, stages, student.heads) if teachers else []
    worker = build_worker(rank, stages, engines[0], student, trainable)
    scoring = build_scoring(rank, planner, stages, teachers, student, translations) if teachers else None
    recorder = build_recorder(rank, run, student, tokens) if config.rollout.save_scores else None
    decode, show = parts.make_decode(rank.tokenizer), parts.make_decode(rank.tokenizer, skip_special_tokens=False)
    rollouts = RolloutsFolder(run.rollouts, decode, lambda token: show([token]), is_written=parallel.is_main)
    validation = probes = None
    if validator is not None and worker is not None:
        validation = Validation(validator, worker, teachers if config.eval.teacher else [], translations)
    if config.eval.record_samples and worker is not None and scoring is not None:
        prompts = probe_prompts(rank, order, validator)
        probes = ProbeReport(prompts, worker, scoring, student, rollouts, config.loss.topk)
    left = progress.guard_left
    source = parts.build_source(
        rank, order, planner, stages, worker, scoring, recorder, guard_left=left, checkpoint=checkpoint
    )
    printer = StepPrinter(console, num_steps=num_steps, every=config.run.print_every)
    return Trainer(
        config=config,
        num_steps=num_steps,
        source=source,
        student=student,
        trainable=trainable,
        stages=stages,
        progress=progress,
        log=RunLog(run, printer, MetricsFile(run.metrics) if parallel.is_main else None, num_steps, show),
        rollouts=rollouts,
        validation=validation,
        probes=probes,
        saver=build_saver(config, run, trainable, last_step=progress.step) if config.checkpoint.enabled else None,
        data_fingerprint=order.fingerprint,
        teachers=teacher_names(config),
        advantages=build_advantages(config),
        guard=source.writer.guard if isinstance(source, OnPolicy) else None,
        copies=list(copies.values()),
        sampling_ranks=worker if isinstance(worker, SamplingRanks) else None,
    )


def build_worker(
    rank: parts.Rank, stages: Stages, sampler: Sampler | None, student: Student, trainable: Trainable
) -> RolloutWorker | SamplingRanks | None:
    """Build what samples the student: this rank's engine, or the ranks that do so alone; None in a replay. A
    collective."""
    if (bridge := rank.role.bridge) is not None:
        version, dtype = (lambda: trainable.num_updates), getattr(torch, rank.resolved.config.model.student.dtype.value)
        return SamplingRanks(bridge, parts.weights_of(rank, student), version, dtype, stages)
    return None if sampler is None else parts.build_worker(rank, stages, sampler, student, trainable)


def build_scoring(
    rank: parts.Rank,
    planner: Planner,
    stages: Stages,
    teachers: Sequence[Teacher],
    student: Student,
    translations: Mapping[int, Translation],
) -> ScoringWorker:
    """Build what lets the teachers score sequences."""
    return ScoringWorker(
        teachers,
        planner,
        stages,
        student.merged_eos_ids,
        hidden=uses_hidden(rank.resolved),
        heads=None if student.heads is None else partial(read_moving_head, student.heads),
        translations=translations,
        begins_early=scores_while_sampling(rank.resolved.config, on_gpus=rank.resolved.ranks.on_gpus),
    )


def probe_prompts(rank: parts.Rank, order: parts.Order, validator: Validator | None) -> Sequence[Prompt]:
    """Return the prompts whose answers are recorded with their scores: held-out ones, or else the first in training."""
    number = rank.resolved.config.eval.record_samples
    if prompts := (parts.held_out_prompts(rank) if validator is None else validator.prompts)[:number]:
        return prompts
    assert not isinstance(order, RecordedSteps), "config.checks refuses it"
    return order.first(number)


def build_advantages(config: Config) -> Callable[..., Mapping[int, torch.Tensor]] | None:
    """Return what gives an update's sequences their advantages; None if the loss has none."""
    loss = config.loss
    if not loss.has_advantages:
        return None
    return partial(advantages, settings=AdvantageSettings(loss.reward, loss.penalty, loss.penalty_share))


def complete_teachers(
    resolved: ResolvedRun, engines: Engines, moving: Callable[..., Teacher], copies: Mapping[str, MovingCopy]
) -> list[Teacher]:
    """Return all teachers of the run: those with an engine, and those that are the student, made by `moving`."""
    sampler, own = engines
    alone = resolved.by_teacher().items() if own else ()
    return [
        teacher if teacher is not None else moving(one, sampler, copy=copies.get(name))
        for (name, one), teacher in zip(alone, own, strict=True)
    ]


def check_data(checkpoint: Path, order: parts.Order) -> None:
    """Raise ConfigError if the training data, and so its order, is not that of the checkpoint's run."""
    before = Checkpoint(checkpoint).state["data"]
    if None not in (before, order.fingerprint) and before != order.fingerprint:
        fix = "restore data, tokenizer and chat template, or start a new run"
        raise ConfigError(f"data.train: its prompts differ from those that the run began with; {fix}")


def build_recorder(rank: parts.Rank, run: RunDir, student: Student, tokens: OwnTokens) -> Recorder:
    """Build the writer of each step's sequences and scores into the run's folder; write what they are read with there.
    A collective."""
    resolved, loss, vocabulary = rank.resolved, rank.resolved.config.loss, rank.resolved.vocabulary
    facts = Facts(
        topk=loss.topk,
        temperature=loss.temperature,
        temperatures=own_temperatures(resolved.config),
        merged_eos_ids=list(vocabulary.merged_eos_ids),
        end_tokens=list(resolved.student.eos_ids),
        vocab_size=vocabulary.size,
        vocabulary=vocabulary_digest(resolved.tokenizer.folder, vocabulary.size),
        hidden=needs_hidden(resolved.config),
    )
    recorder = Recorder(run.scores, facts, rank.parallel)
    for index, (firsts, groups) in tokens.items() if rank.parallel.is_main else ():
        write_tokens(run.scores, index, firsts, groups)
    if student.heads is not None:
        record_heads(run, student.heads)
    return recorder
