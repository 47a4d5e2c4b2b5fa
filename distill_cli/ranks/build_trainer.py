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
from distill_cli.config.compose import load_config
from distill_cli.config.derived import parse_duration, updates_per_step
from distill_cli.config.schema import Config, Precision
from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.data.recorded_run import Facts, vocabulary_digest
from distill_cli.errors import ConfigError
from distill_cli.folders.attempts import launched
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.losses.divergence import DistillLoss
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import fingerprint, locate
from distill_cli.models.model_pair import end_tokens
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
from distill_cli.ranks.pair_facts import folders, one_class, vocabularies
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
    config = load_config(run.config)
    stop = StopFlag(deadline=deadline(config, run))
    parallel = init_parallel(device=pick_device(), mesh=config.mesh)
    tokenizer = build_tokenizer(config)
    make_engines = partial(build_engines, should_stop=stop.is_set)
    trainer, trainable = build_trainer(
        run, console, config, parallel, tokenizer, make_engines=make_engines, checkpoint=checkpoint
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
    config: Config,
    parallel: Parallel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    make_engines: Callable[[Config], Engines],
    checkpoint: Path | None = None,
) -> tuple[Trainer, Trainable]:
    """Everything that a step works with, and what of it a checkpoint is made of. A collective.

    Args:
        checkpoint: what will be loaded; it must have seen the same data.
    """
    # What the user may have got wrong comes first, before engines take their time.
    order, loss = build_order(config, tokenizer, parallel), build_loss(config)
    validator = build_validator(config, parallel, tokenizer, ends=one_class(config))
    if checkpoint is not None:
        check_data(checkpoint, order)
    sampler, scorer = make_engines(config)
    student = build_student(config, loss, parallel)
    num_steps = int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))
    trainable = build_trainable(config, student, num_steps=num_steps, device=parallel.device)
    engines = EnginePair(
        config=config,
        parallel=parallel,
        student=student,
        sampler=sampler,
        scorer=scorer,
        sampling=train_sampling(config),
        verify=IsolatedVerifier(config.data.verifier) if config.data.verifier else None,
        decode=make_decode(tokenizer),
        encode_response=response_encoder(tokenizer, template_kwargs=config.model.chat_template_kwargs),
        turns=build_turns(config, tokenizer, max_tokens=config.rollout.max_sequence_length),
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
        saver=Saver(run, config.checkpoint, trainable) if config.checkpoint.enabled else None,
        rollouts_dir=run.rollouts,
        recorder=build_recorder(config, run, parallel) if config.rollout.save_scores else None,
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
    return DistillLoss(kl_type=loss.kl_type, kl_weight=loss.kl_weight, skew=loss.skew, tail=loss.tail.value)


def build_recorder(config: Config, run: RunDir, parallel: Parallel) -> Recorder:
    """What keeps each step's sequences and scores, in the run's folder."""
    pair, folder = vocabularies(config), config.model.tokenizer
    vocab_size = pair.limit or min(pair.sizes)
    tokenizer = locate(folder, key="model.tokenizer") if folder else folders(config)[0]
    facts = Facts(
        topk=config.loss.topk,
        temperature=config.loss.temperature,
        one_class=list(one_class(config)),
        end_tokens=sorted(end_tokens(folders(config)[0])),
        vocab_size=vocab_size,
        vocabulary=vocabulary_digest(tokenizer, vocab_size),
    )
    return Recorder(run.scores, facts, parallel)


def build_student(config: Config, loss: DistillLoss, parallel: Parallel) -> Student:
    """The student with its weights, laid out over the mesh. A collective."""
    model = config.model
    folder = locate(model.student.path, revision=model.student.revision, key="model.student.path")
    lm = build_lm(folder, trust_remote_code=model.trust_remote_code)
    if model.student.lora.is_on:
        add_adapters(lm, model.student.lora, bf16=config.train.precision is Precision.bf16)
    ends = one_class(config)
    student = Student(lm, loss=loss, temperature=config.loss.temperature, parallel=parallel, one_class=ends)
    if ends and lm.generation_config is not None:
        lm.generation_config.eos_token_id = list(ends)  # whoever samples what is saved stops where training did
    wrap(student, parallel, config.train)
    home = torch.device("cpu") if config.train.cpu_offload else parallel.device
    load_weights(student, lm, folder, device=home, seed=config.train.seed)
    return student


def build_trainable(config: Config, student: Student, *, num_steps: int, device: torch.device) -> Trainable:
    """The student with its optimizer and schedule: what a checkpoint is made of."""
    optimizer = build_optimizer(student, config.train)
    offload = None
    if config.train.offload_optimizer and device.type == "cuda":
        offload = OptimizerOffload(optimizer, rest=torch.device("cpu"), work=device)
    schedule = build_schedule(optimizer, config.train, num_updates=num_steps * updates_per_step(config))
    base = fingerprint(folders(config)[0]) if config.model.student.lora.is_on else None
    trainable = Trainable(student.lm, optimizer, schedule, base)
    return replace(trainable, after_load=offload.to_rest) if offload else trainable
