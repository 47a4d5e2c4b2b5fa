"""Builds one rank's side of a run from its config.yaml, and runs it. `trainer` receives what is made here.

The order matters: the process is prepared before vLLM is imported, the process group stands before an engine is built,
and every rank builds the same engines in the same order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.derived import parse_duration, updates_per_step
from distill_cli.config.schema import Config, Precision
from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.data.recorded_run import Facts, vocabulary_digest
from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import launched
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import fingerprint
from distill_cli.parallel.mesh import Parallel, init_parallel
from distill_cli.ranks.build_engines import Engines, build_engines, train_sampling
from distill_cli.ranks.build_prompts import (
    Order,
    build_order,
    build_tokenizer,
    build_turns,
    build_validator,
    build_watched,
    make_decode,
)
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.off_policy import response_encoder
from distill_cli.rollout.score_files import Recorder
from distill_cli.student.adapters import add_adapters
from distill_cli.student.load import load_weights
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import OptimizerOffload, build_optimizer, build_schedule
from distill_cli.student.synced_weights import save_student
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.train.rollout_worker import EnginePair
from distill_cli.train.run_state import Progress
from distill_cli.train.trainer import Trainer


def run_rank(run: RunDir, console: IO[str], *, checkpoint: Path | None = None) -> None:
    """The whole life of a rank. Every rank of the run calls it.

    Args:
        checkpoint: where to go on from; None begins at the beginning.
    """
    found = ResolvedRun.read(run)
    config = found.config
    stop = StopFlag(deadline=deadline(config, run))
    parallel = init_parallel(device=pick_device(), **asdict(config.mesh))
    tokenizer = build_tokenizer(found)
    make_engines = partial(build_engines, should_stop=stop.is_set)
    trainer, trainable = build_trainer(
        run, console, found, parallel, tokenizer, make_engines=make_engines, checkpoint=checkpoint
    )
    if checkpoint:
        trainer.progress = Progress.of(load(checkpoint, trainable))
    if trainer.saver is not None:
        trainer.saver.last_step = trainer.progress.step
    trainer.stop = stop
    stop.listen(signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    with trainer.printer:
        result = trainer.run()
    if result.state == "finished" or trainer.saver is None:
        save_student(trainer.student, tokenizer, run.student, dtype=getattr(torch, config.model.student.dtype.value))
    if parallel.is_main:
        trainer.metrics_file.close()
        write_json(run.outcome, {**asdict(result), "gap_closed": result.gap_closed})
    close(trainer)


def build_trainer(
    run: RunDir,
    console: IO[str],
    found: ResolvedRun,
    parallel: Parallel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    make_engines: Callable[[ResolvedRun], Engines],
    checkpoint: Path | None = None,
) -> tuple[Trainer, Trainable]:
    """Everything that a step works with, and what of it a checkpoint is made of. A collective.

    Args:
        checkpoint: what will be loaded; it must have seen the same data.
    """
    # What the user may have got wrong comes first, before engines take their time.
    config = found.config
    order, loss = build_order(found, tokenizer, parallel), build_loss(config)
    validator = build_validator(found, parallel, tokenizer)
    if checkpoint is not None:
        check_data(checkpoint, order)
    sampler, scorer = make_engines(found)
    student = build_student(found, loss, parallel)
    num_steps = int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))
    trainable = build_trainable(found, student, num_steps=num_steps, device=parallel.device)
    engines = EnginePair(
        config=config,
        parallel=parallel,
        student=student,
        sampler=sampler,
        scorer=scorer,
        sampling=train_sampling(found),
        verify=IsolatedVerifier(config.data.verifier) if config.data.verifier else None,
        decode=make_decode(tokenizer),
        encode_response=response_encoder(tokenizer, template_kwargs=config.model.chat_template_kwargs),
        turns=build_turns(found, tokenizer, max_tokens=config.rollout.max_sequence_length),
    )
    trainer = Trainer(
        config=config,
        parallel=parallel,
        student=student,
        optimizer=trainable.optimizer,
        schedule=trainable.schedule,
        engines=engines,
        prompts=order,
        show=tokenizer.decode,
        validator=validator,
        metrics_file=MetricsFile(run.metrics) if parallel.is_main else None,
        printer=StepPrinter(console, num_steps=num_steps, every=config.run.print_every),
        num_steps=num_steps,
        saver=build_saver(config, run, trainable) if config.checkpoint.enabled else None,
        rollouts_dir=run.rollouts,
        recorder=build_recorder(found, run, parallel) if config.rollout.save_scores else None,
        watched=build_watched(config, order, validator, tokenizer),
        heartbeat=run.beat if parallel.is_main else lambda stage: None,
    )
    return trainer, trainable


def close(trainer: Trainer) -> None:
    """Engines first, then the process group. A collective."""
    trainer.engines.close()
    dist.barrier()
    dist.destroy_process_group()


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
        one_class=list(vocabulary.merged_eos_ids),
        end_tokens=list(found.student.eos_ids),
        vocab_size=vocabulary.size,
        vocabulary=vocabulary_digest(found.tokenizer.folder, vocabulary.size),
    )
    return Recorder(run.scores, facts, parallel)


def build_saver(config: Config, run: RunDir, trainable: Trainable) -> Saver:
    checkpoint = config.checkpoint
    return Saver(
        run,
        trainable,
        keep_top_k=checkpoint.keep_top_k,
        metric=checkpoint.metric,
        higher_is_better=checkpoint.keeps_highest,
        save_optimizer=checkpoint.save_optimizer,
        async_save=checkpoint.async_save,
    )


def build_student(found: ResolvedRun, loss: DistillLoss, parallel: Parallel) -> Student:
    """The student with its weights, laid out over the mesh. A collective."""
    config, model, folder = found.config, found.config.model, found.student.folder
    lm = build_lm(folder, trust_remote_code=model.trust_remote_code)
    lora = model.student.lora
    if lora.rank:
        bf16 = config.train.precision is Precision.bf16
        add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, bf16=bf16)
    ends = found.vocabulary.merged_eos_ids
    student = Student(lm, loss=loss, temperature=config.loss.temperature, parallel=parallel, one_class=ends)
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
        warmup_updates=train.warmup_steps,
        num_updates=num_steps * updates_per_step(config),
    )
    base = fingerprint(found.student.folder) if config.model.student.lora.is_on else None
    trainable = Trainable(student.lm, optimizer, schedule, base)
    return replace(trainable, after_load=offload.to_rest) if offload else trainable
