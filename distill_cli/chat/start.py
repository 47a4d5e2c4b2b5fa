"""What a chat builds once its engines are started: the models with their conversations, and the teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distill_cli.chat.answers import Speaker
from distill_cli.chat.conversation import Conversation
from distill_cli.chat.engine import ChatEngine, Engines
from distill_cli.chat.setup import ChatModel, Pair
from distill_cli.config.variation import override
from distill_cli.data.prompts import PromptMaker, PromptSettings, load_tokenizer
from distill_cli.engines.asked_teacher import CalledTeacher
from distill_cli.engines.base import Teacher
from distill_cli.errors import ConfigError
from distill_cli.ranks.build_engines import build_teacher, train_sampling

PATIENCE_S = 20.0
"""Seconds without an answer of a teacher's servers after which a chat gives up: somebody waits for it."""


class EngineTeacher(CalledTeacher):
    """An engine of the chat as a teacher, at a temperature."""

    num_ranks = 1

    def __init__(self, engine: ChatEngine, *, temperature: float) -> None:
        self._engine, self._temperature = engine, temperature

    def _call(self, method: str, **arguments: Any) -> Any:
        options = {"temperature": self._temperature} if method == "score" else {}
        return self._engine.call(method, **arguments, **options)


def speaker_of(model: ChatModel, engine: ChatEngine) -> Speaker:
    """Return a model with its engine and an empty conversation. Raises ConfigError if its tokenizer cannot be read."""
    resolved, config = model.resolved, model.resolved.config
    code, template = config.model.trust_remote_code, config.model.chat_template
    try:
        tokenizer = load_tokenizer(resolved.tokenizer.folder, chat_template=template, trust_remote_code=code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:  # of transformers, for damaged files
        what = f"{resolved.tokenizer.path}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})"
        raise ConfigError(f"{what}; give a folder with another, or set model.tokenizer") from error
    tokenizer.model_max_length = sys.maxsize  # else it warns of a full context, which `Conversation` refuses
    kwargs, prompt = config.model.chat_template_kwargs, config.data.prompt_template
    settings = PromptSettings(model.context, prompt, template_kwargs=kwargs, teachers=())
    maker = PromptMaker(tokenizer, settings)
    conversation = Conversation(maker, model.context, model.raise_context, config.data.system_prompt)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return Speaker(model, engine, conversation, train_sampling(resolved), lambda ids: str(decode(ids)))


def teacher_for(pair: Pair, speaker: Speaker, others: Sequence[Speaker], engines: Engines) -> Teacher:
    """Return the teacher of a pair: on its servers, the student itself, a model of the chat, or an engine of its own.

    Args:
        speaker: the student.
        others: all models of the chat.

    Raises:
        ConfigError: it cannot be used as it is configured, or there is no room for it.
        DistillError: it cannot be reached or started.
    """
    config, limit = pair.alone.config, pair.alone.vocabulary.limit
    if config.model.teacher.addresses:
        patient = replace(pair.alone, config=override(config, {"model.teacher.patience_s": PATIENCE_S}))
        served = build_teacher(patient, Path())
        served.wait_ready()
        return served
    if config.model.teacher.is_student:
        engine = speaker.engine
    else:
        teachers = [one for one in others if one.model.role == "teacher" and one.name == engines.setup.teacher]
        same = [one.engine for one in teachers if one.model.resolved.vocabulary.limit == limit]
        engine = same[0] if same else engines.start_teacher(pair)
    return EngineTeacher(engine, temperature=config.loss.temperature)
