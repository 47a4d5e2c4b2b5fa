"""Builds one rank's side of a run from its config.yaml, and runs it. `trainer` receives what is made here.

The order matters: the process is prepared before vLLM is imported, the process group stands before an engine is built,
and every rank builds the same engines in the same order.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from distill_cli.attempts import launched
from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.compose import load_config
from distill_cli.config.derived import (
    engine_length,
    max_prompt_tokens,
    max_teacher_prompt_tokens,
    needs_sampler,
    needs_scorer,
    parse_duration,
    updates_per_step,
    validation_length,
)
from distill_cli.config.schema import Config, EngineModelConfig, LoraSync, Precision, StudentModel, TeacherModel
from distill_cli.data.isolated import IsolatedEnvironments, IsolatedVerifier
from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.data.prompts import (
    PromptMaker,
    load_template,
    load_tokenizer,
    make_prompts,
    read_template,
)
from distill_cli.data.recording import Facts, Recording, vocabulary_digest
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.engines.companion import CompanionScorer, needs_companion
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.engines.settings import Adapter, EngineSettings, SamplingSettings
from distill_cli.errors import ConfigError
from distill_cli.evaluate import Validator, first_of_each
from distill_cli.log import StepPrinter
from distill_cli.losses.divergence import DistillLoss
from distill_cli.modelpath import fingerprint, locate
from distill_cli.pair import OWN_TEMPLATE, EndTokens, Vocabularies, end_tokens
from distill_cli.parallel.mesh import Parallel, init_parallel
from distill_cli.processes import StopFlag
from distill_cli.progress import Progress
from distill_cli.rollout.off_policy import response_encoder
from distill_cli.rollout.recording import Recorder, Replay
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.rundir import RunDir, write_json
from distill_cli.student.adapters import add_adapters
from distill_cli.student.load import load_weights
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import OptimizerOffload, build_optimizer, build_schedule
from distill_cli.student.weights import save_student
from distill_cli.token_views import Watched
from distill_cli.track.recorder import MetricsFile
from distill_cli.trainer import Trainer

log = logging.getLogger(__name__)

Engines = tuple[Sampler | None, Scorer | CompanionScorer | None]
MAX_PROMPTS_AT_START = 50_000
"""Training prompts that are all made before the first step: about 15 s. More are made when their turn comes."""


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
    training = build_training(config, console, loss, order=order, parallel=parallel)
    student = config.model.student
    folder = locate(student.path, revision=student.revision, key="model.student.path")
    base = fingerprint(folder) if student.lora.is_on else None
    trainable = Trainable(training["student"].lm, training["optimizer"], training["schedule"], base)
    trainer = Trainer(
        config=config,
        parallel=parallel,
        sampler=sampler,
        scorer=scorer,
        prompts=order,
        sampling=train_sampling(config),
        verify=IsolatedVerifier(config.data.verifier) if config.data.verifier else None,
        decode=make_decode(tokenizer),
        encode_response=response_encoder(tokenizer, template_kwargs=config.model.chat_template_kwargs),
        show=tokenizer.decode,
        turns=build_turns(config, tokenizer, max_tokens=config.rollout.max_sequence_length),
        validator=validator,
        metrics_file=MetricsFile(run.metrics) if parallel.is_main else None,
        saver=Saver(run, config.checkpoint, trainable) if config.checkpoint.enabled else None,
        rollouts_dir=run.rollouts,
        recorder=build_recorder(config, run, parallel) if config.rollout.save_scores else None,
        watched=build_watched(config, order, validator, tokenizer),
        heartbeat=run.beat if parallel.is_main else lambda stage: None,
        **training,
    )
    return trainer, trainable


def close(trainer: Trainer) -> None:
    """Engines first, in the reverse of the order in which they were built; then the process group. A collective."""
    for engine in (trainer.sampler, trainer.scorer):
        if engine is not None:
            engine.close()
    dist.barrier()
    dist.destroy_process_group()


def deadline(config: Config, run: RunDir) -> float | None:
    """When the run is to have saved and stopped, in seconds since 1970; None is no limit."""
    limit = config.checkpoint.must_save_by
    return launched(run) + parse_duration(limit) if limit else None


def check_data(checkpoint: Path, order: PromptOrder | PromptStream | Replay) -> None:
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


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    model = config.model
    if model.tokenizer is not None:
        return load_tokenizer(locate(model.tokenizer, key="model.tokenizer"), model)
    return load_tokenizer(locate(model.student.path, revision=model.student.revision, key="model.student.path"), model)


def build_engines(config: Config, *, topk: int | None = None, should_stop: Callable[[], bool] | None = None) -> Engines:
    """Both engines, asleep where they sleep at all; in a replay those that it asks. A collective.

    Args:
        topk: words that the scorer gives at each token; None is `loss.topk`.
        should_stop: see `Engine`.
    """
    begin = time.perf_counter()
    # A companion loads on its own while the sampler is built here.
    scorer = build_scorer(config, topk=topk, should_stop=should_stop) if needs_scorer(config) else None
    sampler = None
    if needs_sampler(config):
        limit = shared_vocabulary(config)
        settings = engine_settings(config, config.model.student, config.engine.student, vocab_size=limit)
        sampler = Sampler(settings, should_stop=should_stop)
        sampler.sleep()
    if isinstance(scorer, CompanionScorer):
        scorer.wait_ready()
    log.info("engines ready in %.1f s", time.perf_counter() - begin)
    return sampler, scorer


def build_scorer(
    config: Config, *, topk: int | None = None, should_stop: Callable[[], bool] | None = None
) -> Scorer | CompanionScorer:
    """The teacher's engine, asleep where it sleeps at all. A collective."""
    limit = vocabularies(config).limit
    student = engine_settings(config, config.model.student, config.engine.student, vocab_size=limit)
    teacher = engine_settings(config, config.model.teacher, config.engine.teacher, vocab_size=limit)
    loss = {"topk": topk or config.loss.topk, "temperature": config.loss.temperature}
    if needs_companion(student, teacher):
        scorer = CompanionScorer(teacher, **loss)
    else:
        scorer = Scorer(teacher, **loss, should_stop=should_stop)
    scorer.sleep()
    return scorer


def engine_settings(
    config: Config, model: StudentModel | TeacherModel, engine: EngineModelConfig, *, vocab_size: int | None = None
) -> EngineSettings:
    """What `model.<role>` and `engine.<role>` say, as the engine takes it.

    `vocab_size` is what the two models of a pair share; None is the model's own.
    """
    return EngineSettings(
        path=str(locate(model.path, revision=model.revision, key="model.path")),
        max_model_len=engine_length(config, engine),
        dtype=model.dtype.value,
        quantization=getattr(model, "quantization", None),
        trust_remote_code=config.model.trust_remote_code,
        vocab_size=vocab_size,
        tensor_parallel=engine.tensor_parallel,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_bytes=None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * 2**30),
        enforce_eager=True if engine.enforce_eager else None,
        adapter=adapter_of(model),
        sleep_mode=torch.cuda.is_available() if engine.sleep is None else engine.sleep,
        seed=config.train.seed,
        kwargs=engine.kwargs,
    )


def adapter_of(model: StudentModel | TeacherModel) -> Adapter | None:
    """What the engine has beside its weights."""
    lora = getattr(model, "lora", None)
    return Adapter(lora.rank, lora.alpha) if lora and lora.is_on and lora.sync is LoraSync.adapter else None


def folders(config: Config) -> tuple[Path, Path]:
    """The student's and the teacher's."""
    roles = {"student": config.model.student, "teacher": config.model.teacher}
    return tuple(locate(m.path, revision=m.revision, key=f"model.{role}.path") for role, m in roles.items())


def vocabularies(config: Config) -> Vocabularies:
    name = config.model.tokenizer
    return Vocabularies.of(*folders(config), tokenizer=locate(name, key="model.tokenizer") if name else None)


def shared_vocabulary(config: Config) -> int | None:
    """Ids from here on are neither sampled nor scored; None where student and teacher have the same."""
    if config.rollout.replay is not None:  # its teacher may be gone
        return Recording.of(config.rollout.replay).facts.vocab_size
    return vocabularies(config).limit


def one_class(config: Config) -> tuple[int, ...]:
    """The tokens that end an answer and are taken for one (`model.eos_map`)."""
    if config.rollout.replay is not None:
        return tuple(Recording.of(config.rollout.replay).facts.one_class)
    limit = vocabularies(config).limit or sys.maxsize
    return tuple(token for token in EndTokens.of(*folders(config)).one_class(config) if token < limit)


def build_loss(config: Config) -> DistillLoss:
    loss = config.loss
    return DistillLoss(kl_type=loss.kl_type, kl_weight=loss.kl_weight, skew=loss.skew, tail=loss.tail.value)


def build_order(
    config: Config, tokenizer: PreTrainedTokenizerBase, parallel: Parallel
) -> PromptOrder | PromptStream | Replay:
    """The training prompts in their order: all made at the start, or one after the other where there are too many.

    In a replay what was recorded.
    """
    if config.rollout.replay is not None:
        return Replay(Recording.of(config.rollout.replay), topk=config.loss.topk, parallel=parallel)
    data, batch_size, seed = config.data, config.rollout.prompts_per_step, config.train.seed
    examples = load_examples(data.train, key="data.train", context=data.teacher_context)
    make = prompt_maker(config, tokenizer)
    if isinstance(examples, Stream) or len(examples) > MAX_PROMPTS_AT_START:
        return PromptStream(
            examples, make, batch_size=batch_size, seed=seed, shuffle=data.shuffle, buffer=data.shuffle_buffer
        )
    prompts = make_prompts(examples, make, key="data.train")
    return PromptOrder(prompts, batch_size=batch_size, seed=seed, shuffle=data.shuffle)


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


def prompt_maker(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptMaker:
    teacher, template = config.model.teacher, config.model.teacher.chat_template
    environment = config.rollout.environment
    if template == OWN_TEMPLATE:
        folder = locate(teacher.path, revision=teacher.revision, key="model.teacher.path")
        template = load_template(folder, trust_remote_code=config.model.trust_remote_code)
    elif template is not None:
        template = read_template(template)
    return PromptMaker(
        tokenizer,
        data=config.data,
        model=config.model,
        max_tokens=max_prompt_tokens(config),
        teacher_max_tokens=max_teacher_prompt_tokens(config),
        teacher_template=template,
        opening=IsolatedEnvironments(environment).make().reset if environment else None,
    )


def build_training(
    config: Config,
    console: IO[str],
    loss: DistillLoss,
    *,
    order: PromptOrder | PromptStream | Replay,
    parallel: Parallel,
) -> dict[str, Any]:
    """The student, its optimizer and schedule, and what shows how far it has come: fields of `Trainer`."""
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
    num_steps = int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))
    optimizer = build_optimizer(student, config.train)
    if config.train.offload_optimizer and parallel.device.type == "cuda":
        OptimizerOffload(optimizer, rest=torch.device("cpu"), work=parallel.device)
    return {
        "student": student,
        "optimizer": optimizer,
        "schedule": build_schedule(optimizer, config.train, num_steps=num_steps * updates_per_step(config)),
        "printer": StepPrinter(console, num_steps=num_steps, every=config.run.print_every),
        "num_steps": num_steps,
    }


def build_validator(
    config: Config, parallel: Parallel, tokenizer: PreTrainedTokenizerBase, *, ends: tuple[int, ...] = ()
) -> Validator | None:
    """`ends` are tokens that end an answer besides the model's own and those of rollout.stop_token_ids."""
    settings = config.eval
    if not config.data.validation or not (settings.period or settings.at_start or settings.at_end):
        return None
    examples = load_examples(config.data.validation, key="data.validation")
    most = settings.max_samples if isinstance(examples, Stream) else None
    prompts = make_prompts(examples, prompt_maker(config, tokenizer), key="data.validation", limit=most)
    return Validator(
        prompts=first_of_each(prompts, settings.max_samples),
        repeat=settings.repeat,
        sampling=SamplingSettings(
            max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=tuple(config.rollout.stop),
            stop_token_ids=(*config.rollout.stop_token_ids, *ends),
        ),
        verify=IsolatedVerifier(config.data.verifier),
        decode=make_decode(tokenizer),
        turns=build_turns(config, tokenizer, max_tokens=validation_length(config)),
        batch_size=settings.batch_size,
        seed=config.train.seed,
        parallel=parallel,
    )


def build_watched(
    config: Config, order: PromptOrder, validator: Validator | None, tokenizer: PreTrainedTokenizerBase
) -> Watched | None:
    """The first validation prompts; where nothing validates, the first of the training data."""
    if config.eval.record_samples == 0 or (validator is None and isinstance(order, Replay)):
        return None
    prompts = validator.prompts if validator is not None else order.prompts
    return Watched(
        prompts=prompts[: config.eval.record_samples],
        token_text=lambda token: tokenizer.decode([token], skip_special_tokens=False),
    )


def build_turns(config: Config, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Turns | None:
    if config.rollout.environment is None:
        return None
    ends = {tokenizer.eos_token_id, *config.rollout.stop_token_ids, *one_class(config)}
    if config.rollout.replay is None:
        of_models = EndTokens.of(*folders(config))
        ends |= of_models.student | of_models.teacher
    return Turns(
        make=IsolatedEnvironments(config.rollout.environment).make,
        max_turns=config.rollout.max_turns,
        max_tokens=max_tokens,
        decode=make_decode(tokenizer),
        observation_ids=observation_encoder(
            tokenizer,
            template_kwargs=config.model.chat_template_kwargs,
            end_ids=ends,
        ),
    )


def train_sampling(config: Config) -> SamplingSettings:
    rollout = config.rollout
    return SamplingSettings(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=max(rollout.top_k, 0),
        stop=tuple(rollout.stop),
        stop_token_ids=(*rollout.stop_token_ids, *one_class(config)),
    )


def make_decode(tokenizer: PreTrainedTokenizerBase):
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)
