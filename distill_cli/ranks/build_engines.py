"""Builds a rank's engines from its config: the student's sampler and the teacher."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill_cli.config.derived import engine_length, needs_sampler, needs_scorer
from distill_cli.config.schema import Config, EngineModelConfig, LoraSync, StudentModel, TeacherModel
from distill_cli.engines.base import Sampler, Teacher
from distill_cli.engines.companion import CompanionTeacher, needs_companion
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import Adapter, EngineSettings, SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.models.model_files import locate
from distill_cli.ranks.pair_facts import merged_eos_ids, shared_vocabulary, vocabularies

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engines:
    """A rank's engines; None for one that the run does not need."""

    sampler: Sampler | None
    teacher: Teacher | None

    def close(self) -> None:
        """Close both, in the reverse of the order in which they were built. A collective."""
        for engine in (self.sampler, self.teacher):
            if engine is not None:
                engine.close()


def build_engines(config: Config, *, topk: int | None = None, should_stop: Callable[[], bool] | None = None) -> Engines:
    """Build the engines that the run needs, asleep if they sleep at all. A collective.

    Args:
        topk: tokens that the teacher gives at each position; None is `loss.topk`.
        should_stop: see `Engine`.
    """
    begin = time.perf_counter()
    # A companion loads on its own while the sampler is built here.
    teacher = build_teacher(config, topk=topk, should_stop=should_stop) if needs_scorer(config) else None
    sampler = None
    if needs_sampler(config):
        limit = shared_vocabulary(config)
        settings = engine_settings(config, config.model.student, config.engine.student, vocab_size=limit)
        sampler = VllmSampler(settings, should_stop=should_stop)
        sampler.sleep()
    if teacher is not None:
        teacher.wait_ready()
    log.info("engines ready in %.1f s", time.perf_counter() - begin)
    return Engines(sampler, teacher)


def build_teacher(config: Config, *, topk: int | None = None, should_stop: Callable[[], bool] | None = None) -> Teacher:
    """Build the teacher, asleep if it sleeps at all; it may load still (`wait_ready`). A collective."""
    limit = vocabularies(config).limit
    student = engine_settings(config, config.model.student, config.engine.student, vocab_size=limit)
    teacher = engine_settings(config, config.model.teacher, config.engine.teacher, vocab_size=limit)
    loss = {"topk": topk or config.loss.topk, "temperature": config.loss.temperature}
    if needs_companion(student, teacher, on_gpu=torch.cuda.is_available()):
        engine = CompanionTeacher(teacher, **loss)
    else:
        engine = VllmTeacher(teacher, **loss, should_stop=should_stop)
    engine.sleep()
    return engine


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


def train_sampling(config: Config) -> SamplingSettings:
    rollout = config.rollout
    return SamplingSettings(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=max(rollout.top_k, 0),
        stop=tuple(rollout.stop),
        stop_token_ids=(*rollout.stop_token_ids, *merged_eos_ids(config)),
    )
