"""Build the source of a rank's sequences from its config, with the parts: ordered prompts, worker, planner."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase

from distill_cli.checkpoint.saver import Trainable
from distill_cli.config.schema import Config, OffPolicy
from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.data.prompts import make_prompts
from distill_cli.data.recorded_run import Recording
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.engines.base import Sampler
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks.build_engines import train_sampling
from distill_cli.ranks.build_prompts import build_turns, make_decode, prompt_maker
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.off_policy import Mixture, dataset_samples, response_encoder, teacher_samples
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.pack import Planner, plan_batch
from distill_cli.rollout.recorded_steps import RecordedSteps, Replay
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.source import RolloutSource
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.model import Student
from distill_cli.student.synced_weights import synced_parameters

Order = PromptOrder | PromptStream | RecordedSteps
MAX_PROMPTS_AT_START = 50_000
"""Most training prompts to make before the first step (about 15 s); more are made as training reaches them."""


def build_order(resolved: ResolvedRun, tokenizer: PreTrainedTokenizerBase, parallel: Parallel) -> Order:
    """Build the training prompts in their order, or the recorded steps of a replay."""
    config, data = resolved.config, resolved.config.data
    if config.rollout.replay is not None:
        return RecordedSteps(Recording.of(config.rollout.replay), topk=config.loss.topk, parallel=parallel)
    examples = load_examples(data.train, key="data.train", context=data.teacher_context)
    make = prompt_maker(resolved, tokenizer)
    batch_size, seed, shuffle = config.rollout.prompts_per_step, config.train.seed, data.shuffle
    if isinstance(examples, Stream) or len(examples) > MAX_PROMPTS_AT_START:
        stream = partial(PromptStream, buffer=data.shuffle_buffer, left_out=make.warnings)
        return stream(examples, make, batch_size=batch_size, seed=seed, shuffle=shuffle)
    prompts = make_prompts(examples, make, key="data.train")
    return PromptOrder(prompts, batch_size=batch_size, seed=seed, shuffle=shuffle)


def build_source(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    order: Order,
    planner: Planner,
    stages: Stages,
    worker: RolloutWorker | None,
    scoring: ScoringWorker | None,
    recorder: Recorder | None,
) -> RolloutSource:
    """Build the source of every step's scored sequences; a replay needs no workers."""
    rollout = config.rollout
    if isinstance(order, RecordedSteps):
        return Replay(order, planner, stages)
    assert worker is not None, "only a replay has no engines"
    assert scoring is not None
    student = OnPolicy(order, rollout.generations_per_prompt, worker, scoring, recorder)
    if rollout.on_policy_fraction == 1:
        return student
    if rollout.off_policy is OffPolicy.teacher:
        write = partial(teacher_samples, scoring=scoring, sampling=worker.sampling)
    else:
        encode = response_encoder(tokenizer, template_kwargs=config.model.chat_template_kwargs)
        write = partial(dataset_samples, encode=encode, max_new_tokens=rollout.max_new_tokens)
    return Mixture(student, rollout.on_policy_fraction, config.train.seed, write_others=write)


def build_worker(
    resolved: ResolvedRun,
    tokenizer: PreTrainedTokenizerBase,
    stages: Stages,
    sampler: Sampler,
    student: Student,
    trainable: Trainable,
) -> RolloutWorker:
    """Build the worker that samples and judges the student's answers in training. A collective."""
    config = resolved.config
    return RolloutWorker(
        sampler=sampler,
        weights=partial(synced_parameters, student, as_adapter=config.model.student.lora.syncs_adapter),
        version=lambda: trainable.num_updates,
        sampling=train_sampling(resolved),
        seed=config.train.seed,
        stages=stages,
        decode=make_decode(tokenizer),
        verify=IsolatedVerifier(config.data.verifier) if config.data.verifier else None,
        turns=build_turns(resolved, tokenizer, max_tokens=config.rollout.max_sequence_length),
    )


def build_planner(config: Config, parallel: Parallel) -> Planner:
    """Build the planner of micro-batches."""
    cut = partial(
        plan_batch,
        num_ranks=parallel.data_size,
        max_tokens=config.train.micro_batch_tokens,
        packing=config.train.packing,
        multiple=parallel.length_multiple,
    )
    return Planner(config.train.global_batch_size, parallel.data_rank, cut)
