"""Build a rank's engines from its config: the student's sampler and the teacher."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.config.derived import needs_sampler, needs_scorer, scores_while_sampling
from distill_cli.config.teachers import ONLY
from distill_cli.engines.base import Sampler, Teacher
from distill_cli.engines.companion import CompanionTeacher, needs_companion
from distill_cli.engines.from_config import settings_of
from distill_cli.engines.moving import ScoringSampler
from distill_cli.engines.rank_teacher import RankTeacher
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.server_files import finder
from distill_cli.engines.server_info import DISTILL, VLLM
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.folders.run_dir import RunDir
from distill_cli.parallel.roles import Bridge
from distill_cli.resolved import ResolvedRun

log = logging.getLogger(__name__)

Engines = tuple[Sampler | None, list[Teacher | None]]
"""A rank's sampler, None if the run needs none, and its teachers in the config's order, none if it needs none; None for
a teacher that is the student (`build_source.moving_teacher`)."""


def build_engines(
    resolved: ResolvedRun,
    run: RunDir,
    *,
    should_stop: Callable[[], bool] | None = None,
    untouched: tuple[str, ...] = (),
    bridge: Bridge | None = None,
) -> Engines:
    """Build the engines that the run needs, asleep if they can sleep. A collective.

    Args:
        run: its folder has the addresses of teachers that are served by jobs of their own.
        should_stop: see `VllmEngine`.
        untouched: tensors of the student's files that the trainer does not have.
        bridge: to the ranks that sample and score; None if this one does everything.
    """
    begin, config, sampler = time.perf_counter(), resolved.config, None
    # Built first: a companion loads while the sampler is built.
    alone = resolved.by_teacher() if needs_scorer(config) else {}
    works_apart: bool | None = scores_while_sampling(config, on_gpus=torch.cuda.is_available()) or None
    if bridge is not None:
        works_apart = False  # no engine of the student is in this process
    links, teachers = {} if bridge is None else bridge.links, list[Teacher | None]()
    for index, (name, one) in enumerate(alone.items()):
        if index in links:
            teachers.append(RankTeacher(links[index][0]))
        elif one.config.model.teacher.is_student:
            teachers.append(None)
        else:
            teachers.append(build_teacher(one, run.servers(name), works_apart=works_apart, should_stop=should_stop))
    if needs_sampler(config) and bridge is None:
        settings = replace(engine_settings(resolved, "student"), untouched=untouched)
        sampler = build_sampler(resolved, settings, scores=None in teachers, should_stop=should_stop)
        sampler.sleep()
    for teacher in teachers:
        if teacher is not None:
            teacher.wait_ready()
    log.info("engines ready in %.1f s", time.perf_counter() - begin)
    return sampler, teachers


def build_sampler(
    resolved: ResolvedRun, settings: EngineSettings, *, scores: bool, should_stop: Callable[[], bool] | None
) -> VllmSampler:
    """Build the student's engine. A collective.

    Args:
        scores: a teacher is the student, and scores with this engine.
    """
    if not scores:
        return VllmSampler(settings, should_stop=should_stop)
    lengths = resolved.lengths
    settings = replace(settings, max_model_len=max(lengths.student, lengths.teacher))
    return ScoringSampler(settings, topk=resolved.config.loss.topk, should_stop=should_stop)


def build_teacher(
    resolved: ResolvedRun,
    servers: Path,
    *,
    works_apart: bool | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Teacher:
    """Build the run's only teacher, asleep if it can sleep; call `wait_ready` before using it. A collective.

    Args:
        servers: folder in which the servers of the teacher's job write where they are, if it has one.
        works_apart: give it a process of its own; None if vLLM needs that next to the student's engine.
        should_stop: see `VllmEngine`.
    """
    loss, model = resolved.config.loss, resolved.config.model.teacher
    if model.is_served:
        kind = resolved.servers.get(ONLY, DISTILL.name)
        return served_class(kind)(
            model.addresses,
            topk=loss.topk,
            temperature=loss.temperature,
            # vLLM's server cuts nothing: that its ids are those of config.json is checked at each answer.
            vocab_size=resolved.vocabulary.size if kind == VLLM.name else resolved.vocabulary.limit,
            patience_s=model.patience_s,
            certificate=model.certificate,
            should_stop=should_stop,
            find=finder(servers) if model.has_job else None,
        )
    student, teacher = engine_settings(resolved, "student"), engine_settings(resolved, "teacher")
    engine: Teacher
    if works_apart is None:
        works_apart = needs_companion(student, teacher, on_gpu=torch.cuda.is_available())
    if works_apart:
        engine = CompanionTeacher(teacher, topk=loss.topk, temperature=loss.temperature)
    else:
        engine = VllmTeacher(teacher, topk=loss.topk, temperature=loss.temperature, should_stop=should_stop)
    engine.sleep()
    return engine


def served_class(kind: str) -> Any:
    """Return the class of teachers behind servers of a kind (`engines.server_info`)."""
    from distill_cli.engines.served import ServedTeacher  # its libraries take a while to import
    from distill_cli.engines.vllm_server import VllmServerTeacher

    return {one.kind.name: one for one in (ServedTeacher, VllmServerTeacher)}[kind]


def leave() -> None:
    """Leave the process group when every rank has done its part. A collective.

    Engines end with the process: closing them first, which collects garbage several times, takes seconds.
    """
    dist.barrier()
    dist.destroy_process_group()


def engine_settings(resolved: ResolvedRun, role: str) -> EngineSettings:
    """Return the settings of `model.<role>` and `engine.<role>`."""
    sleep = getattr(resolved.config.engine, role).sleep
    return settings_of(
        resolved.config,
        role,
        folder=resolved.model(role).folder,
        max_model_len=getattr(resolved.lengths, role),
        vocab_size=resolved.vocabulary.limit,
        sleep_mode=torch.cuda.is_available() if sleep is None else sleep,
    )


def train_sampling(resolved: ResolvedRun) -> SamplingSettings:
    """Return how the student answers in training."""
    rollout = resolved.config.rollout
    return SamplingSettings(
        max_new_tokens=rollout.longest_answer,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=max(rollout.top_k, 0),
        stop=tuple(rollout.stop),
        stop_token_ids=(*rollout.stop_token_ids, *resolved.vocabulary.merged_eos_ids),
    )
