"""Build one rank's trainer from its config.yaml and run it.

The order matters: prepare the process before importing vLLM, join the process group before building an engine, and
build the same engines in the same order on every rank.
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
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import fingerprint
from distill_cli.parallel.mesh import Parallel, init_parallel
from distill_cli.ranks.build_engines import Engines, build_engines
from distill_cli.ranks.build_prompts import build_tokenizer, build_validator, make_decode
from distill_cli.ranks.build_source import Order, build_order, build_planner, build_source, build_worker
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.recorded_steps import RecordedSteps
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import ScoringWorker
from distill_cli.student.adapters import add_adapters
from distill_cli.student.load import load_weights
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import OptimizerOffload, build_optimizer, build_schedule
from distill_cli.student.synced_weights import save_student
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress
from distill_cli.train.token_report import ProbeReport
from distill_cli.train.trainer import Trainer
from distill_cli.train.validation import Validation


def run_rank(run: RunDir, console: IO[str], *, checkpoint: Path | None = None) -> None:
    """Build a rank's trainer, run it and write its outcome. A collective.

    Args:
        checkpoint: the checkpoint to continue from; None starts at step 1.
    """
    resolved = ResolvedRun.read(run)
    config = resolved.config
    limit_s = parse_duration(config.checkpoint.must_save_by or "")
    stop = StopFlag(deadline=None if limit_s is None else launched(run) + limit_s)
    parallel = init_parallel(device=pick_device(), **asdict(config.mesh))
    tokenizer = build_tokenizer(resolved)
    trainer, engines = build_trainer(run, console, resolved, parallel, tokenizer, stop=stop, checkpoint=checkpoint)
    stop.listen(signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    with trainer.log.printer:
        outcome = trainer.run()
    if outcome.state == "finished" or trainer.saver is None:
        save_student(trainer.student, tokenizer, run.student, dtype=getattr(torch, config.model.student.dtype.value))
    trainer.log.close()
    if parallel.is_main:
        write_json(run.outcome, asdict(outcome))
    close(engines)


def build_trainer(
    run: RunDir,
    console: IO[str],
    resolved: ResolvedRun,
    parallel: Parallel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop: StopFlag,
    checkpoint: Path | None,
) -> tuple[Trainer, Engines]:
    """Build everything that a step works with, as at the start of a run or from a checkpoint. A collective."""
    # Find the user's mistakes first, before engines take their time.
    config, is_main = resolved.config, parallel.is_main
    order, loss = build_order(resolved, tokenizer, parallel), build_loss(config)
    validator = build_validator(resolved, parallel, tokenizer)
    if checkpoint is not None:
        check_data(checkpoint, order)
    engines = build_engines(resolved, should_stop=stop.is_set)
    student = build_student(resolved, loss, parallel)
    num_steps = count_steps(config, order)
    trainable = build_trainable(resolved, student, num_steps=num_steps, device=parallel.device)
    progress = Progress.of(load(checkpoint, trainable)) if checkpoint is not None else Progress()
    decode, show = make_decode(tokenizer), make_decode(tokenizer, skip_special_tokens=False)
    printer = StepPrinter(console, num_steps=num_steps, every=config.run.print_every)
    log = RunLog(run, printer, MetricsFile(run.metrics) if is_main else None, num_steps, show)
    stages, planner = Stages(parallel, stop, on_stage=log.stage), build_planner(config, parallel)
    worker = scoring = validation = probes = None
    if engines.sampler is not None:
        worker = build_worker(resolved, tokenizer, stages, engines.sampler, student, trainable)
    if engines.teacher is not None:
        scoring = ScoringWorker(engines.teacher, planner, stages, student.merged_eos_ids)
    recorder = build_recorder(resolved, run, parallel) if config.rollout.save_scores else None
    rollouts = RolloutsFolder(run.rollouts, decode, lambda token: show([token]), is_written=is_main)
    if validator is not None and worker is not None:
        validation = Validation(validator, worker, engines.teacher if config.eval.teacher else None)
    if (number := config.eval.record_samples) and worker is not None and scoring is not None:
        if validator is None:
            assert not isinstance(order, RecordedSteps), "config.checks refuses it"
            prompts = order.first(number)
        else:
            prompts = validator.prompts[:number]
        probes = ProbeReport(prompts, worker, scoring, student, rollouts)
    trainer = Trainer(
        config=config,
        num_steps=num_steps,
        source=build_source(config, tokenizer, order, planner, stages, worker, scoring, recorder),
        student=student,
        trainable=trainable,
        parallel=parallel,
        stages=stages,
        progress=progress,
        log=log,
        rollouts=rollouts,
        validation=validation,
        probes=probes,
        saver=build_saver(config, run, trainable, last_step=progress.step) if config.checkpoint.enabled else None,
        data_fingerprint=order.fingerprint,
    )
    return trainer, engines


def close(engines: Engines) -> None:
    """Close the engines, in the reverse of the order in which they were built, then the process group. A collective."""
    for engine in engines:
        if engine is not None:
            engine.close()
    dist.barrier()
    dist.destroy_process_group()


def count_steps(config: Config, order: Order) -> int:
    """Return the number of steps of the whole run."""
    return int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))


def build_saver(config: Config, run: RunDir, trainable: Trainable, *, last_step: int = 0) -> Saver:
    """Build the writer of the run's checkpoints; `last_step` is the last completed step. A collective."""
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


def check_data(checkpoint: Path, order: Order) -> None:
    """Raise ConfigError if the training data, and so its order, is not that of the checkpoint's run."""
    before = Checkpoint(checkpoint).state["data"]
    if None not in (before, order.fingerprint) and before != order.fingerprint:
        raise ConfigError(
            "data.train: its prompts differ from those that the run began with; restore data, tokenizer and chat "
            "template, or start a new run"
        )


def pick_device() -> torch.device:
    """Return this rank's GPU, or the CPU if the launcher hid the GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def build_loss(config: Config) -> DistillLoss:
    """Build the loss of the config. Raises ConfigError if it cannot be built."""
    loss = config.loss
    return DistillLoss(kl_type=loss.kl_type, tail=loss.tail.value, **loss.parameters, **loss.kwargs)


def build_recorder(resolved: ResolvedRun, run: RunDir, parallel: Parallel) -> Recorder:
    """Build the writer of each step's sequences and scores into the run's folder."""
    loss, vocabulary = resolved.config.loss, resolved.vocabulary
    facts = Facts(
        topk=loss.topk,
        temperature=loss.temperature,
        merged_eos_ids=list(vocabulary.merged_eos_ids),
        end_tokens=list(resolved.student.eos_ids),
        vocab_size=vocabulary.size,
        vocabulary=vocabulary_digest(resolved.tokenizer.folder, vocabulary.size),
    )
    return Recorder(run.scores, facts, parallel)


def build_student(resolved: ResolvedRun, loss: DistillLoss, parallel: Parallel, *, role: str = "student") -> Student:
    """Build the student with its weights, laid out over the mesh. A collective.

    Args:
        role: `teacher` builds the teacher in the student's place, without adapters.
    """
    config, model, train = resolved.config, resolved.config.model, resolved.config.train
    folder, lora, bf16 = resolved.model(role).folder, model.student.lora, train.precision is Precision.bf16
    lm = build_lm(folder, trust_remote_code=model.trust_remote_code)
    if lora.rank and role == "student":
        add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, bf16=bf16)
    ends = resolved.vocabulary.merged_eos_ids
    student = Student(lm, loss=loss, temperature=config.loss.temperature, parallel=parallel, merged_eos_ids=ends)
    if ends and lm.generation_config is not None:
        lm.generation_config.eos_token_id = list(ends)  # samplers of the saved student then stop where training did
    kept, offload = train.activation_checkpointing, train.cpu_offload
    wrap(student, parallel, bf16=bf16, checkpointing=kept.value, compile=train.compile, cpu_offload=offload)
    home = torch.device("cpu") if offload else parallel.device
    load_weights(lm, folder, device=home, seed=train.seed)
    return student


def build_trainable(resolved: ResolvedRun, student: Student, *, num_steps: int, device: torch.device) -> Trainable:
    """Build the student's optimizer and schedule; with the student they are what a checkpoint holds."""
    config, train = resolved.config, resolved.config.train
    beta1, beta2 = train.betas
    decay = train.weight_decay
    optimizer = build_optimizer(student, lr=train.lr, betas=(beta1, beta2), eps=train.eps, weight_decay=decay)
    offload = None
    if train.offload_optimizer and device.type == "cuda":
        offload = OptimizerOffload(optimizer, rest=torch.device("cpu"), work=device)
    schedule = build_schedule(
        optimizer,
        kind=train.schedule.value,
        warmup_updates=train.warmup_updates,
        num_updates=num_steps * updates_per_step(config),
    )
    base = fingerprint(resolved.student.folder) if config.model.student.lora.is_on else None
    trainable = Trainable(student.lm, optimizer, schedule, base)
    return replace(trainable, after_load=offload.to_rest) if offload else trainable
