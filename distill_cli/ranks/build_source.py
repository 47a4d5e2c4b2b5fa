"""Build a rank's source of training sequences, and what validation needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_cli.checkpoint.saver import Trainable
from distill_cli.checkpoint.store import IN_FLIGHT, Checkpoint
from distill_cli.config.derived import needs_hidden, validates
from distill_cli.config.schema import OffPolicy
from distill_cli.config.teachers import own_temperatures, teacher_configs
from distill_cli.data.isolated import IsolatedEnvironments, IsolatedVerifier
from distill_cli.data.order import PromptBatches, PromptOrder, PromptStream
from distill_cli.data.prompts import (
    PromptMaker,
    PromptSettings,
    TeacherPromptSettings,
    load_template,
    load_tokenizer,
    make_prompts,
)
from distill_cli.data.recorded_run import Recording
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.engines.base import Sampler
from distill_cli.engines.moving import MovingTeacher, ScoringSampler
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Outgoing
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_pair import OWN_TEMPLATE, read_template
from distill_cli.parallel.mesh import TIMEOUT_S, Parallel, init_parallel, layout
from distill_cli.parallel.roles import SHARED, Engines, Role, join_roles
from distill_cli.ranks.build_engines import train_sampling
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.carry_over import CarryOver
from distill_cli.rollout.in_flight import InFlight
from distill_cli.rollout.length_guard import LengthGuard
from distill_cli.rollout.off_policy import dataset_samples, response_encoder, teacher_samples
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.pack import Planner, plan_batch
from distill_cli.rollout.remote import SamplingRanks, SplitSource
from distill_cli.rollout.score_files import RecordedSteps, Recorder, Replay
from distill_cli.rollout.source import RolloutSource
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.step_writer import StepWriter
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.rollout.workers import Responder, RolloutWorker, ScoringWorker
from distill_cli.student.model import Student
from distill_cli.student.moving import MovingCopy
from distill_cli.student.weights import synced_parameters
from distill_cli.tokens.token_map import TokenMap
from distill_cli.tokens.translation import Translation
from distill_cli.train.validation import Validator, first_of_each
from distill_cli.types import Prompt

FIRST_COPY = -10
"""Versions of a moving teacher's weights count down from here, apart from the student's and the sampler's own."""
Order = PromptOrder | PromptStream | RecordedSteps
MAX_PROMPTS_AT_START = 50_000
"""Most training prompts to make before the first step (about 15 s); more are made as training reaches them."""


@dataclass(frozen=True)
class Rank:
    """What every part of a rank is built from."""

    resolved: ResolvedRun
    parallel: Parallel
    tokenizer: PreTrainedTokenizerBase
    """Renders the prompts."""
    role: Role = SHARED

    @classmethod
    def join(cls, run: RunDir, *, splits: bool = False) -> Rank:
        """Read the run, join the process group and build the mesh. A collective.

        Args:
            splits: let some ranks sample alone, if the config says so (`cluster.roles`).
        """
        resolved, device, role = ResolvedRun.read(run), pick_device(), SHARED
        mesh = asdict(resolved.config.mesh)
        if splits and resolved.ranks.samplers:
            pairs = zip(resolved.ranks.scorers, teacher_configs(resolved.config).values(), strict=True)
            teachers = [Engines(number, one.engine.teacher.tensor_parallel) for number, one in pairs]
            samplers = resolved.ranks.samplers
            role = join_roles(num_samplers=samplers, teachers=teachers, device=device, timeout_s=TIMEOUT_S)
            parallel = layout(device=device, **(mesh if role.name == "train" else {}))
        else:
            parallel = init_parallel(device=device, **mesh)
        model, folder = resolved.config.model, resolved.tokenizer.folder
        template, code = model.chat_template, model.trust_remote_code
        return cls(resolved, parallel, load_tokenizer(folder, chat_template=template, trust_remote_code=code), role)


def pick_device() -> torch.device:
    """Return this rank's GPU, or the CPU if the launcher hid the GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def prompt_maker(rank: Rank, *, is_scored: bool = True) -> PromptMaker:
    """Build the maker of prompts, which begin with the environment's opening if there is an environment."""
    environment = rank.resolved.config.rollout.environment
    opening = IsolatedEnvironments(environment).make().reset if environment else None
    return PromptMaker(rank.tokenizer, prompt_settings(rank.resolved), opening=opening, is_scored=is_scored)


def prompt_settings(resolved: ResolvedRun) -> PromptSettings:
    """Return how examples become prompts."""
    data, model, alone = resolved.config.data, resolved.config.model, resolved.by_teacher()
    return PromptSettings(
        max_tokens=resolved.lengths.prompt,
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        template_kwargs=model.chat_template_kwargs,
        overlong=data.overlong_prompts.value,
        teachers=tuple(teacher_prompt_settings(name, one) for name, one in alone.items()),
        mixes=not own_temperatures(resolved.config)
        and not needs_hidden(resolved.config)
        and not any(one.config.model.teacher.has_own_tokenizer for one in alone.values()),
    )


def teacher_prompt_settings(name: str, resolved: ResolvedRun) -> TeacherPromptSettings:
    """Return how examples become prompts of the run's only teacher."""
    data, model, tokenizer = resolved.config.data, resolved.config.model, None
    template = model.teacher.chat_template
    if model.teacher.has_own_tokenizer and resolved.teachers:
        tokenizer = load_tokenizer(resolved.model("teacher").folder, trust_remote_code=model.trust_remote_code)
        template = None if template == OWN_TEMPLATE else template
    if template == OWN_TEMPLATE and not resolved.teachers:
        template = None  # an evaluation makes no prompt of the teacher's
    elif template == OWN_TEMPLATE:
        template = load_template(resolved.model("teacher").folder, trust_remote_code=model.trust_remote_code)
    elif template is not None:
        template = read_template(template)
    return TeacherPromptSettings(
        name=name,
        tokenizer=tokenizer,
        max_tokens=resolved.lengths.teacher_prompt,
        chat_template=template,
        template_kwargs=model.teacher.chat_template_kwargs,
        has_context=data.teacher_context is not None,
        prompt_template=data.teacher_prompt_template,
    )


def build_translations(resolved: ResolvedRun) -> dict[int, Translation]:
    """Build what translates to the tokens of the teachers with a tokenizer of their own, by their index."""
    alone = enumerate(resolved.by_teacher().values())
    own = {index: one for index, one in alone if one.config.model.teacher.has_own_tokenizer}
    maps = {index: TokenMap.read(one.student, one.model("teacher"), one.tokenizer) for index, one in own.items()}
    topk = resolved.config.loss.topk
    return {
        index: Translation(tokens, topk, own[index].lengths.teacher, own[index].config.loss.alignment.value)
        for index, tokens in maps.items()
    }


def held_out_prompts(rank: Rank) -> list[Prompt]:
    """Return the prompts of data.validation, eval.max_samples of each dataset at most; none without it."""
    validation, number = rank.resolved.config.data.validation, rank.resolved.config.eval.max_samples
    if not validation:
        return []
    examples = load_examples(validation, key="data.validation")
    limit = number if isinstance(examples, Stream) else None
    prompts = make_prompts(examples, prompt_maker(rank, is_scored=False), key="data.validation", limit=limit)
    return first_of_each(prompts, number)


def build_validator(rank: Rank) -> Validator | None:
    """Build the validation; None if the run has none."""
    resolved, config, settings = rank.resolved, rank.resolved.config, rank.resolved.config.eval
    if not validates(config):
        return None
    sampling = replace(train_sampling(resolved), temperature=settings.temperature, top_p=settings.top_p, top_k=0)
    sampling = replace(sampling, max_new_tokens=settings.max_new_tokens or sampling.max_new_tokens, logp=False)
    responder = build_responder(rank, sampling, max_tokens=resolved.lengths.validation)
    return Validator(held_out_prompts(rank), responder, settings.batch_size, rank.parallel, settings.repeat)


def build_responder(rank: Rank, sampling: SamplingSettings, *, max_tokens: int) -> Responder:
    """Build what samples and judges answers; `max_tokens` limits a sequence of several turns."""
    config, decode, turns = rank.resolved.config, make_decode(rank.tokenizer), build_turns(rank, max_tokens=max_tokens)
    verify = IsolatedVerifier(config.data.verifier) if config.data.verifier else None
    return Responder(sampling, config.train.seed, decode, verify, turns)


def build_turns(rank: Rank, *, max_tokens: int) -> Turns | None:
    """Build the turns of the config's environment; None if it has none."""
    resolved, tokenizer, rollout = rank.resolved, rank.tokenizer, rank.resolved.config.rollout
    if rollout.environment is None:
        return None
    ends = {tokenizer.eos_token_id, *rollout.stop_token_ids, *resolved.vocabulary.merged_eos_ids}
    if resolved.recorded_run is None:
        models = (resolved.student, *resolved.teachers.values())
        ends |= {token for model in models for token in model.eos_ids}
    kwargs = resolved.config.model.chat_template_kwargs
    return Turns(
        make=IsolatedEnvironments(rollout.environment).make,
        max_turns=rollout.max_turns,
        max_tokens=max_tokens,
        decode=make_decode(tokenizer),
        observation_ids=observation_encoder(tokenizer, template_kwargs=kwargs, end_ids=ends),
    )


def make_decode(tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> Callable[[list[int]], str]:
    """Return the function from token ids to text."""
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def build_order(rank: Rank) -> Order:
    """Build the training prompts in their order, or the recorded steps of a replay."""
    config, data, recorded = rank.resolved.config, rank.resolved.config.data, rank.resolved.recorded_run
    if recorded is not None:
        steps = partial(RecordedSteps, seed=config.train.seed, shuffle=config.rollout.replay_shuffle)
        return steps(Recording.of(str(recorded)), topk=config.loss.topk, parallel=rank.parallel)
    columns = {"context": data.teacher_context, "teacher": data.teacher_key}
    examples = load_examples(data.train, key="data.train", **columns)
    make = prompt_maker(rank)
    batch_size, seed, shuffle = config.rollout.prompts_per_step, config.train.seed, data.shuffle
    if isinstance(examples, Stream) or len(examples) > MAX_PROMPTS_AT_START:
        stream = partial(PromptStream, buffer=data.shuffle_buffer, left_out=make.warnings)
        return stream(examples, make, batch_size=batch_size, seed=seed, shuffle=shuffle)
    prompts = make_prompts(examples, make, key="data.train")
    return PromptOrder(prompts, batch_size=batch_size, seed=seed, shuffle=shuffle)


def build_source(
    rank: Rank,
    order: Order,
    planner: Planner,
    stages: Stages,
    worker: RolloutWorker | SamplingRanks | None,
    scoring: ScoringWorker | None,
    recorder: Recorder | None,
    *,
    guard_left: int = 0,
    checkpoint: Path | None = None,
) -> RolloutSource:
    """Build the source of every step's scored sequences; a replay needs no workers.

    Args:
        worker: samples the student on this rank, or stands for the ranks that do.
        guard_left: `Progress.guard_left`.
        checkpoint: what is in flight is read from it; None if nothing is.
    """
    if isinstance(order, RecordedSteps):
        return Replay(order, planner, stages)
    assert worker is not None, "only a replay has no engines"
    assert scoring is not None
    rollout, batches = rank.resolved.config.rollout, PromptBatches(order)
    in_flight = read_in_flight(checkpoint, batches)
    if isinstance(worker, SamplingRanks):
        return SplitSource(worker, scoring, recorder, rollout.staleness, in_flight, rollout.carry_over)
    writer = build_writer(rank, order, batches, worker, scoring, guard_left=guard_left)
    return OnPolicy(writer, scoring, recorder, rollout.staleness, in_flight)


def read_in_flight(checkpoint: Path | None, batches: PromptBatches) -> InFlight:
    """Return what was in flight at a checkpoint: nothing without one."""
    if checkpoint is None:
        return InFlight()
    if (file := checkpoint / IN_FLIGHT).is_file():
        return InFlight.load(file, batches.batch)
    return InFlight(sampled_step=Checkpoint(checkpoint).step)


def build_writer(
    rank: Rank,
    order: PromptOrder | PromptStream,
    batches: PromptBatches,
    worker: RolloutWorker,
    scoring: ScoringWorker | None = None,
    *,
    guard_left: int = 0,
) -> StepWriter:
    """Build the writer of each step's sequences.

    Args:
        scoring: the teachers, where they write some of the answers.
        guard_left: `Progress.guard_left`.
    """
    config, rollout, write = rank.resolved.config, rank.resolved.config.rollout, None
    if rollout.on_policy_fraction < 1 and rollout.off_policy is OffPolicy.dataset:
        encode = response_encoder(rank.tokenizer, template_kwargs=config.model.chat_template_kwargs)
        write = partial(dataset_samples, encode=encode)
    guard = carry_over = None
    if scoring is not None:
        by_teacher = partial(teacher_samples, scoring=scoring, sampling=worker.responder.sampling)
        if rollout.on_policy_fraction < 1 and rollout.off_policy is OffPolicy.teacher:
            write = by_teacher
        if rollout.guard_above is not None:
            guard = LengthGuard(rollout.guard_above, rollout.guard_share, rollout.guard_steps, by_teacher, guard_left)
    number = rollout.generations_per_prompt
    if rollout.carry_over:
        budget, most = rollout.token_budget, rollout.max_age
        carry_over = CarryOver(batches, number, rollout.num_sequences, budget, most, worker)
    fraction, limit = rollout.on_policy_fraction, rollout.max_new_tokens_at
    return StepWriter(order, number, worker, fraction, write, guard, limit, carry_over)


def build_worker(rank: Rank, stages: Stages, sampler: Sampler, student: Student, trainable: Trainable) -> RolloutWorker:
    """Build the worker that samples and judges the student's answers in training. A collective."""
    config, sampling = rank.resolved.config, train_sampling(rank.resolved)
    responder = build_responder(rank, sampling, max_tokens=config.rollout.max_sequence_length)
    return RolloutWorker(sampler, weights_of(rank, student), lambda: trainable.num_updates, responder, stages)


def weights_of(rank: Rank, student: Student) -> Callable[[], Iterable[Outgoing]]:
    """Return the function that returns the student's weights as its engine takes them."""
    assert student.published is not None
    as_adapter = rank.resolved.config.model.student.lora.syncs_adapter
    return partial(synced_parameters, student.lm, student.published, as_adapter=as_adapter)


def build_copies(resolved: ResolvedRun, lm: PreTrainedModel) -> dict[str, MovingCopy]:
    """Return the weights of the teachers that are the student of earlier steps, by name."""
    moving = {name: one.config.model.teacher for name, one in resolved.by_teacher().items()}
    moving = {name: teacher for name, teacher in moving.items() if teacher.moves_apart}
    return {
        name: MovingCopy(lm, ema=teacher.ema, refresh=teacher.refresh, number=number)
        for number, (name, teacher) in enumerate(moving.items())
    }


def moving_teacher(
    resolved: ResolvedRun, sampler: Sampler, student: Student, trainable: Trainable, copy: MovingCopy | None
) -> MovingTeacher:
    """Build the run's only teacher, which is the student, or a copy that follows it."""
    assert isinstance(sampler, ScoringSampler)
    assert student.published is not None

    def version() -> int:
        if copy is None or copy.moves == trainable.num_updates == 0:
            return trainable.num_updates
        return FIRST_COPY - copy.moves

    as_adapter = resolved.config.model.student.lora.syncs_adapter
    return MovingTeacher(
        sampler,
        temperature=resolved.config.loss.temperature,
        weights=partial(synced_parameters, student.lm, student.published, as_adapter=as_adapter),
        version=version,
        in_place=nullcontext if copy is None else copy.in_place,
    )


def build_planner(rank: Rank) -> Planner:
    """Build the planner of micro-batches."""
    config, parallel = rank.resolved.config, rank.parallel
    cut = partial(
        plan_batch,
        num_ranks=parallel.data_size,
        max_tokens=config.train.micro_batch_tokens,
        packing=config.train.packing,
        one_row=parallel.context.size() > 1,
        multiple=parallel.length_multiple,
    )
    return Planner(config.train.global_batch_size, parallel.data_rank, cut)
