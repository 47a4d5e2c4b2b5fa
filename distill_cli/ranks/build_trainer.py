"""Build one rank's trainer from its config.yaml and run it.

The order matters: prepare the process before importing vLLM, join the process group before building an engine, and
build the same engines in the same order on every rank.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO

import torch
from transformers import PreTrainedModel

from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.checkpoint.store import Checkpoint, prune
from distill_cli.config.derived import (
    ends_by_epochs,
    needs_hidden,
    parse_duration,
    scores_while_sampling,
    updates_per_step,
)
from distill_cli.config.loss_schema import Alignment
from distill_cli.config.schema import Config, Precision
from distill_cli.config.teachers import own_temperatures, teacher_configs, teacher_names
from distill_cli.data.recorded_run import Facts, Recording, vocabulary_digest
from distill_cli.engines.base import Teacher
from distill_cli.engines.guarded import GuardedTeacher
from distill_cli.errors import ConfigError
from distill_cli.folders.metrics_file import MetricsFile
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.losses import divergence, token_weight
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.groups import TokenGroups
from distill_cli.losses.objective import Objective, TokenWeight
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import fingerprint
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks import build_source as parts
from distill_cli.ranks.build_engines import Engines, build_engines, leave
from distill_cli.ranks.handshakes import shake_hands
from distill_cli.ranks.sampler_rank import sampler_rank
from distill_cli.ranks.scorer_rank import scorer_rank
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.advantages import AdvantageSettings, advantages
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.remote import SamplingRanks
from distill_cli.rollout.score_files import (
    RecordedSteps,
    Recorder,
    read_head,
    read_tokens,
    write_head,
    write_tokens,
)
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.adapters import add_adapters
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.moving import MovingCopy
from distill_cli.student.optimizer import OptimizerOffload, build_optimizer, build_schedule
from distill_cli.student.published import Published
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.student.weights import load_weights, save_student
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.tokens.translation import Translation
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress
from distill_cli.train.token_report import ProbeReport
from distill_cli.train.trainer import Trainer
from distill_cli.train.validation import Validation
from distill_cli.types import ModelHead


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
    resolved, parallel, config, is_main = rank.resolved, rank.parallel, rank.resolved.config, rank.parallel.is_main
    # Find the user's mistakes first, before engines take their time.
    order = parts.build_order(rank)
    build_objective(config)  # the student builds its own
    validator = parts.build_validator(rank)
    if checkpoint is not None:
        check_data(checkpoint, order)
    built = build_model(resolved)  # before engines: vLLM changes classes of transformers
    bridge = rank.role.bridge
    engines = build_engines(resolved, run, should_stop=stop.is_set, untouched=built[1].untouched, bridge=bridge)
    sampler = engines[0]
    student = build_student(resolved, parallel, built)
    num_steps = count_steps(config, order)
    trainable = build_trainable(resolved, student, num_steps=num_steps, device=parallel.device)
    copies = parts.build_copies(resolved, student.lm) if engines[1] else {}
    trainable = replace(trainable, copies=list(copies.values()))
    progress = Progress.of(load(checkpoint, trainable)) if checkpoint is not None else Progress()
    decode, show = parts.make_decode(rank.tokenizer), parts.make_decode(rank.tokenizer, skip_special_tokens=False)
    printer = StepPrinter(console, num_steps=num_steps, every=config.run.print_every)
    log = RunLog(run, printer, MetricsFile(run.metrics) if is_main else None, num_steps, show)
    stages, planner = Stages(parallel, stop), parts.build_planner(rank)
    moving = partial(parts.moving_teacher, student=student, trainable=trainable)
    teachers = complete_teachers(resolved, engines, moving, copies)
    translations = parts.build_translations(resolved) if teachers else {}
    of_tokens = own_tokens(resolved, translations)
    student.groups = {index: groups.to(parallel.device) for index, (_, groups) in of_tokens.items()}
    is_hidden = uses_hidden(resolved)
    if is_hidden:
        student.heads = build_heads(rank, student, {index: firsts for index, (firsts, _) in of_tokens.items()})
    teachers = shake_hands(rank, run, teachers, stages, student.heads) if teachers else []
    worker: RolloutWorker | SamplingRanks | None = None
    if bridge is not None:
        version, dtype = (lambda: trainable.num_updates), getattr(torch, config.model.student.dtype.value)
        worker = SamplingRanks(bridge, parts.weights_of(rank, student), version, dtype, stages)
    elif sampler is not None:
        worker = parts.build_worker(rank, stages, sampler, student, trainable)
    early = scores_while_sampling(config, on_gpus=resolved.ranks.on_gpus)
    scoring = None
    if teachers:
        scoring = ScoringWorker(
            teachers,
            planner,
            stages,
            student.merged_eos_ids,
            hidden=is_hidden,
            heads=None if student.heads is None else partial(read_moving_head, student.heads),
            translations=translations,
            begins_early=early,
        )
    validation = probes = None
    recorder = build_recorder(resolved, run, parallel) if config.rollout.save_scores else None
    if recorder is not None:
        for index, (firsts, groups) in of_tokens.items() if is_main else ():
            write_tokens(run.scores, index, firsts, groups)
        if student.heads is not None:
            record_heads(run, student.heads)
    rollouts = RolloutsFolder(run.rollouts, decode, lambda token: show([token]), is_written=is_main)
    if validator is not None and worker is not None:
        validation = Validation(validator, worker, teachers if config.eval.teacher else [], translations)
    if (number := config.eval.record_samples) and worker is not None and scoring is not None:
        prompts = (parts.held_out_prompts(rank) if validator is None else validator.prompts)[:number]
        if not prompts:
            assert not isinstance(order, RecordedSteps), "config.checks refuses it"
            prompts = order.first(number)
        probes = ProbeReport(prompts, worker, scoring, student, rollouts, config.loss.topk)
    left = progress.guard_left
    source = parts.build_source(
        rank, order, planner, stages, worker, scoring, recorder, guard_left=left, checkpoint=checkpoint
    )
    return Trainer(
        config=config,
        num_steps=num_steps,
        source=source,
        student=student,
        trainable=trainable,
        stages=stages,
        progress=progress,
        log=log,
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


def own_tokens(
    resolved: ResolvedRun, translations: Mapping[int, Translation]
) -> dict[int, tuple[torch.Tensor, TokenGroups]]:
    """Return by index, of the teachers with a tokenizer of their own, the student's first token of each of theirs, and
    the groups of the student's: of a replay's as they were recorded."""
    if (recorded := resolved.recorded_run) is None:
        return {index: (one.firsts, one.groups) for index, one in translations.items()}
    folder = Recording.of(str(recorded)).folder
    found = {index: read_tokens(folder, index) for index in range(len(teacher_names(resolved.config)))}
    return {index: one for index, one in found.items() if one is not None}


def build_heads(
    rank: parts.Rank, student: Student, firsts: Mapping[int, torch.Tensor] = MappingProxyType({})
) -> TeacherHeads:
    """Build the holder of the teachers' heads: of a replay's as they were recorded, else still empty. A collective.

    Args:
        firsts: see `TeacherHeads`.
    """
    vocabulary, recorded = rank.resolved.vocabulary, rank.resolved.recorded_run
    shard = student.lm.get_output_embeddings().weight.shape[0] // rank.parallel.tensor.size()
    heads = TeacherHeads(rank.parallel, vocabulary.size if vocabulary.limit is None else vocabulary.limit, shard)
    heads.firsts |= {index: one.to(rank.parallel.device) for index, one in firsts.items()}
    if recorded is not None:
        folder = Recording.of(str(recorded)).folder
        for index in range(len(teacher_names(rank.resolved.config))):
            heads.read(index, partial(read_head, folder, index))
    return heads


def uses_hidden(resolved: ResolvedRun) -> bool:
    """Whether the teachers' scores are hidden states: those that are recorded, in a replay."""
    recorded = resolved.recorded_run
    return needs_hidden(resolved.config) if recorded is None else Recording.of(str(recorded)).facts.hidden


def record_heads(run: RunDir, heads: TeacherHeads) -> None:
    """Write each teacher's head into the run's scores, by the first ranks of each shard of it. A collective."""
    for index, head in heads.gather().items():
        if heads.parallel.data_rank == heads.parallel.context.get_local_rank() == 0:
            bias, transform = None if head.bias_V is None else head.bias_V.cpu(), head.transform
            rows = ModelHead(head.weight_VH.cpu(), bias, transform.scale, transform.soft_cap)
            write_head(run.scores, index, heads.rows(index)[0], rows)


def read_moving_head(heads: TeacherHeads, index: int, teacher: Teacher) -> None:
    """Take the head of a teacher whose weights move, as it scored with it. A collective."""
    assert isinstance(teacher, GuardedTeacher)
    if teacher.is_moving:
        heads.read(index, teacher.head)


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


def count_steps(config: Config, order: parts.Order) -> int:
    """Return the number of steps of the whole run."""
    if not ends_by_epochs(config):
        return config.train.max_steps
    return int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))


def build_saver(config: Config, run: RunDir, trainable: Trainable, *, last_step: int = 0) -> Saver:
    """Build the writer of the run's checkpoints; `last_step` is the last completed step. A collective."""
    settings = config.checkpoint
    return Saver(
        run,
        trainable,
        last_step=last_step,
        prune=partial(prune, settings=settings),
        save_optimizer=settings.save_optimizer,
        async_save=settings.async_save,
    )


def check_data(checkpoint: Path, order: parts.Order) -> None:
    """Raise ConfigError if the training data, and so its order, is not that of the checkpoint's run."""
    before = Checkpoint(checkpoint).state["data"]
    if None not in (before, order.fingerprint) and before != order.fingerprint:
        fix = "restore data, tokenizer and chat template, or start a new run"
        raise ConfigError(f"data.train: its prompts differ from those that the run began with; {fix}")


def build_loss(config: Config) -> DistillLoss:
    """Build the loss of the config. Raises ConfigError if it cannot be built."""
    loss = config.loss
    kwargs = divergence.SIGNATURES.taken(loss.kl_type, loss.kwargs)
    return DistillLoss(kl_type=loss.kl_type, tail=loss.tail.value, **loss.parameters, **kwargs)


def build_objective(config: Config) -> Objective:
    """Build what the config's `loss` section minimises. Raises ConfigError if it cannot be built."""
    loss, weight, family = config.loss, None, token_weight.SIGNATURES
    if (name := loss.token_weight) is not None:
        function = family.resolve(name, **loss.weight_parameters, **family.taken(name, loss.kwargs))
        weight = TokenWeight(function, family.positional_of(name))
    return Objective(
        build_loss(config),
        temperature=loss.temperature,
        support=loss.support.value,
        topk=loss.topk,
        divergence_weight=loss.divergence_weight,
        weight=weight,
        clip=loss.token_clip,
        policy_gradient=loss.policy_gradient,
        likelihood=loss.likelihood,
        max_ratio=loss.max_ratio,
        by_rank=loss.alignment is Alignment.rank,
    )


def build_own_objectives(config: Config) -> dict[int, Objective]:
    """Return the objectives of the teachers whose loss is not the run's, by `Prompt.teachers`."""
    alone = enumerate(teacher_configs(config).values())
    return {1 << index: build_objective(one) for index, one in alone if one.loss != config.loss}


def build_recorder(resolved: ResolvedRun, run: RunDir, parallel: Parallel) -> Recorder:
    """Build the writer of each step's sequences and scores into the run's folder."""
    loss, vocabulary = resolved.config.loss, resolved.vocabulary
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
    return Recorder(run.scores, facts, parallel)


Built = tuple[PreTrainedModel, Published]
"""A model without its weights, and where they lie."""


def build_model(resolved: ResolvedRun, *, role: str = "student") -> Built:
    """Build `model.<role>` in the student's code, without its weights."""
    return build_lm(resolved.model(role).folder, trust_remote_code=resolved.config.model.trust_remote_code)


def build_student(resolved: ResolvedRun, parallel: Parallel, built: Built, *, role: str = "student") -> Student:
    """Read a model's weights, laid out over the mesh. A collective.

    Args:
        role: the model's; the teacher gets no adapters.
    """
    config, model, train = resolved.config, resolved.config.model, resolved.config.train
    (lm, published), lora, bf16 = built, model.student.lora, train.precision is Precision.bf16
    if lora.rank and role == "student":
        add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, bf16=bf16)
    ends = resolved.vocabulary.merged_eos_ids
    student = Student(
        lm,
        objective=build_objective(config),
        own_objectives=build_own_objectives(config),
        has_advantages=config.loss.has_advantages,
        parallel=parallel,
        merged_eos_ids=ends,
        published=published,
        router_aux_loss=train.router_aux_loss if role == "student" else 0.0,
    )
    if ends and lm.generation_config is not None:
        lm.generation_config.eos_token_id = list(ends)  # samplers of the saved student then stop where training did
    kept, offload = train.activation_checkpointing, train.cpu_offload
    wrap(student, parallel, bf16=bf16, checkpointing=kept.value, compile=train.compile, cpu_offload=offload)
    home = torch.device("cpu") if offload else parallel.device
    load_weights(lm, published, device=home, seed=train.seed)
    return student


def build_trainable(resolved: ResolvedRun, student: Student, *, num_steps: int, device: torch.device) -> Trainable:
    """Build the student's optimizer and schedule; with the student they are what a checkpoint holds."""
    config, train = resolved.config, resolved.config.train
    beta1, beta2 = train.betas
    decay, warmup, num_updates = train.weight_decay, train.warmup_updates, num_steps * updates_per_step(config)
    optimizer = build_optimizer(student, lr=train.lr, betas=(beta1, beta2), eps=train.eps, weight_decay=decay)
    schedule = build_schedule(optimizer, kind=train.schedule.value, warmup_updates=warmup, num_updates=num_updates)
    base = fingerprint(resolved.student.folder) if config.model.student.lora.is_on else None
    trainable = Trainable(student.lm, optimizer, schedule, base)
    if train.offload_optimizer and device.type == "cuda":
        offload = OptimizerOffload(optimizer, rest=torch.device("cpu"), work=device)
        return replace(trainable, after_load=offload.to_rest)
    return trainable
