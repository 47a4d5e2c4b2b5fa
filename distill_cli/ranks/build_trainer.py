"""Builds one rank's side of a run from its config.yaml, and runs it. `trainer` receives what is made here.

The order matters: the process is prepared before vLLM is imported, the process group stands before an engine is built,
and every rank builds the same engines in the same order.
"""

from __future__ import annotations

import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.derived import parse_duration, updates_per_step
from distill_cli.config.schema import Config, Precision
from distill_cli.data.recorded_run import Facts, vocabulary_digest
from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import launched
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import fingerprint
from distill_cli.parallel.mesh import Parallel, init_parallel
from distill_cli.ranks.build_engines import Engines, build_engines
from distill_cli.ranks.build_prompts import build_tokenizer, build_validator, make_decode
from distill_cli.ranks.build_source import (
    Order,
    build_order,
    build_planner,
    build_source,
    build_worker,
)
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.student.adapters import add_adapters
from distill_cli.student.load import load_weights
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import OptimizerOffload, build_optimizer, build_schedule
from distill_cli.student.synced_weights import save_student
from distill_cli.train.checkpoints import Checkpoints
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress
from distill_cli.train.token_report import ProbeReport
from distill_cli.train.trainer import Trainer, TrainerSettings
from distill_cli.train.validation import Validation


def run_rank(run: RunDir, console: IO[str], *, checkpoint: Path | None = None) -> None:
    """Build a rank's trainer, run it and leave its outcome. Every rank of the run calls it.

    Args:
        checkpoint: where to go on from; None begins at the beginning.
    """
    found = ResolvedRun.read(run)
    config = found.config
    stop = StopFlag(deadline=deadline(config, run))
    parallel = init_parallel(device=pick_device(), **asdict(config.mesh))
    tokenizer = build_tokenizer(found)
    trainer, engines = build_trainer(run, console, found, parallel, tokenizer, stop=stop, checkpoint=checkpoint)
    stop.listen(signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    with trainer.log.printer:
        result = trainer.run()
    if result.state == "finished" or trainer.checkpoints is None:
        save_student(trainer.student, tokenizer, run.student, dtype=getattr(torch, config.model.student.dtype.value))
    trainer.log.close()
    if parallel.is_main:
        write_json(run.outcome, {**asdict(result), "gap_closed": result.gap_closed})
    close(engines)


def build_trainer(
    run: RunDir,
    console: IO[str],
    found: ResolvedRun,
    parallel: Parallel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop: StopFlag,
    checkpoint: Path | None,
) -> tuple[Trainer, Engines]:
    """Everything that a step works with, as a run begins or as it is in a checkpoint. A collective."""
    # What the user may have got wrong comes first, before engines take their time.
    config = found.config
    order, loss = build_order(found, tokenizer, parallel), build_loss(config)
    validator = build_validator(found, parallel, tokenizer)
    if checkpoint is not None:
        check_data(checkpoint, order)
    engines = build_engines(found, should_stop=stop.is_set)
    student = build_student(found, loss, parallel)
    settings = trainer_settings(config, order)
    trainable = build_trainable(found, student, num_steps=settings.num_steps, device=parallel.device)
    progress = Progress.of(load(checkpoint, trainable)) if checkpoint is not None else Progress()
    shown = {"is_main": parallel.is_main, "show": tokenizer.decode, "print_every": config.run.print_every}
    log = RunLog(run, console, num_steps=settings.num_steps, **shown)
    stages, planner = Stages(parallel, stop, on_stage=log.stage), build_planner(config, parallel)
    trained = {"student": student, "trainable": trainable}
    worker = build_worker(found, tokenizer, stages, sampler=engines.sampler, **trained) if engines.sampler else None
    scoring = ScoringWorker(engines.teacher, planner, stages, student.merged_eos_ids) if engines.teacher else None
    recorder = build_recorder(found, run, parallel) if config.rollout.save_scores else None
    rollouts = RolloutsFolder(
        run.rollouts,
        decode=make_decode(tokenizer),
        token_text=lambda token: tokenizer.decode([token], skip_special_tokens=False),
        is_written=parallel.is_main,
    )
    validation = probes = None
    if validator is not None:
        validation = Validation(validator, worker, engines.teacher if config.eval.teacher else None)
    if number := config.eval.record_samples:
        prompts = order.first(number) if validator is None else validator.prompts[:number]
        probes = ProbeReport(prompts, worker, scoring, student, rollouts)
    trainer = Trainer(
        settings=settings,
        source=build_source(config, tokenizer, order, planner, stages, worker, scoring, recorder),
        student=student,
        optimizer=trainable.optimizer,
        schedule=trainable.schedule,
        parallel=parallel,
        stages=stages,
        progress=progress,
        log=log,
        rollouts=rollouts,
        validation=validation,
        probes=probes,
        checkpoints=build_checkpoints(config, run, trainable, order, last_step=progress.step),
    )
    return trainer, engines


def close(engines: Engines) -> None:
    """Engines first, then the process group. A collective."""
    engines.close()
    dist.barrier()
    dist.destroy_process_group()


def trainer_settings(config: Config, order: Order) -> TrainerSettings:
    return TrainerSettings(
        num_steps=count_steps(config, order),
        max_grad_norm=config.train.max_grad_norm,
        max_bad_updates=config.train.max_bad_updates,
        max_truncated_rate=config.rollout.max_truncated_rate,
        on_truncation=config.rollout.on_truncation.value,
        eval_period=config.eval.period,
        eval_at_start=config.eval.at_start,
        eval_at_end=config.eval.at_end,
    )


def count_steps(config: Config, order: Order) -> int:
    """Steps of the whole run."""
    return int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))


def build_checkpoints(
    config: Config, run: RunDir, trainable: Trainable, order: Order, *, last_step: int
) -> Checkpoints | None:
    """`last_step` is the last one that is done, 0 at the beginning. A collective."""
    settings = config.checkpoint
    if not settings.enabled:
        return None
    saver = build_saver(config, run, trainable, last_step=last_step)
    return Checkpoints(saver, settings.period, settings.metric, settings.keeps_highest, order.fingerprint)


def build_saver(config: Config, run: RunDir, trainable: Trainable, *, last_step: int = 0) -> Saver:
    settings = config.checkpoint
    return Saver(
        run,
        trainable,
        last_step=last_step,
        keep_top_k=settings.keep_top_k,
        metric=settings.metric,
        higher_is_better=settings.keeps_highest,
        save_optimizer=settings.save_optimizer,
        async_save=settings.async_save,
    )


def deadline(config: Config, run: RunDir) -> float | None:
    """When the run is to have saved and stopped, in seconds since 1970; None is no limit."""
    limit = config.checkpoint.must_save_by
    return launched(run) + parse_duration(limit) if limit else None


def check_data(checkpoint: Path, order: Order) -> None:
    """Raises ConfigError where the training data is not what the checkpoint's run saw: its order would be another."""
    before = Checkpoint.at(checkpoint).state["data"]
    if None not in (before, order.fingerprint) and before != order.fingerprint:
        raise ConfigError(
            "data.train: its prompts are not those that the run began with, as they were; bring data, tokenizer and "
            "chat template back, or start a new run"
        )


def pick_device() -> torch.device:
    """This rank's GPU, or the CPU where the launcher hid them all."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def build_loss(config: Config) -> DistillLoss:
    loss = config.loss
    return DistillLoss(kl_type=loss.kl_type, tail=loss.tail.value, **loss.parameters, **loss.kwargs)


def build_recorder(found: ResolvedRun, run: RunDir, parallel: Parallel) -> Recorder:
    """What keeps each step's sequences and scores, in the run's folder."""
    loss, vocabulary = found.config.loss, found.vocabulary
    facts = Facts(
        topk=loss.topk,
        temperature=loss.temperature,
        merged_eos_ids=list(vocabulary.merged_eos_ids),
        end_tokens=list(found.student.eos_ids),
        vocab_size=vocabulary.size,
        vocabulary=vocabulary_digest(found.tokenizer.folder, vocabulary.size),
    )
    return Recorder(run.scores, facts, parallel)


def build_student(found: ResolvedRun, loss: DistillLoss, parallel: Parallel) -> Student:
    """The student with its weights, laid out over the mesh. A collective."""
    config, model, folder = found.config, found.config.model, found.student.folder
    lm = build_lm(folder, trust_remote_code=model.trust_remote_code)
    lora = model.student.lora
    if lora.rank:
        bf16 = config.train.precision is Precision.bf16
        add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, bf16=bf16)
    ends = found.vocabulary.merged_eos_ids
    student = Student(lm, loss=loss, temperature=config.loss.temperature, parallel=parallel, merged_eos_ids=ends)
    if ends and lm.generation_config is not None:
        lm.generation_config.eos_token_id = list(ends)  # whoever samples what is saved stops where training did
    return wrap_and_load(student, folder, config, parallel)


def wrap_and_load(student: Student, folder: Path, config: Config, parallel: Parallel) -> Student:
    """Lay the student out over the mesh and load the folder's weights. A collective."""
    train = config.train
    wrap(
        student,
        parallel,
        bf16=train.precision is Precision.bf16,
        checkpointing=train.activation_checkpointing.value,
        compile=train.compile,
        cpu_offload=train.cpu_offload,
    )
    home = torch.device("cpu") if train.cpu_offload else parallel.device
    load_weights(student, student.lm, folder, device=home, seed=train.seed)
    return student


def build_trainable(found: ResolvedRun, student: Student, *, num_steps: int, device: torch.device) -> Trainable:
    """The student with its optimizer and schedule: what a checkpoint is made of."""
    config, train = found.config, found.config.train
    beta1, beta2 = train.betas
    optimizer = build_optimizer(
        student, lr=train.lr, betas=(beta1, beta2), eps=train.eps, weight_decay=train.weight_decay
    )
    offload = None
    if train.offload_optimizer and device.type == "cuda":
        offload = OptimizerOffload(optimizer, rest=torch.device("cpu"), work=device)
    schedule = build_schedule(
        optimizer,
        kind=train.schedule.value,
        warmup_updates=train.warmup_updates,
        num_updates=num_steps * updates_per_step(config),
    )
    base = fingerprint(found.student.folder) if config.model.student.lora.is_on else None
    trainable = Trainable(student.lm, optimizer, schedule, base)
    return replace(trainable, after_load=offload.to_rest) if offload else trainable
