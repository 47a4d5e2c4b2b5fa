"""Values that several keys decide together, worked out in one place."""

from __future__ import annotations

import math

from distill_cli.config.schema import Config


def max_prompt_tokens(config: Config) -> int:
    """What `data.max_prompt_tokens` says, or the room that the longest answer leaves."""
    return config.data.max_prompt_tokens or config.rollout.max_sequence_length - config.rollout.max_new_tokens


def max_teacher_prompt_tokens(config: Config) -> int:
    """What `data.max_teacher_prompt_tokens` says, or as many as the student's, or more where it has a context."""
    if config.data.max_teacher_prompt_tokens is not None:
        return config.data.max_teacher_prompt_tokens
    has_context = config.data.teacher_context is not None
    return config.rollout.max_sequence_length if has_context else max_prompt_tokens(config)


def needed_length(config: Config) -> int:
    """Tokens of the longest sequence that an engine may see, in training or in validation."""
    return max(config.rollout.max_sequence_length, validation_length(config))


def validation_length(config: Config) -> int:
    """Tokens of the longest sequence in validation."""
    one_turn = max_prompt_tokens(config) + (config.eval.max_new_tokens or config.rollout.max_new_tokens)
    return max(one_turn, config.rollout.max_sequence_length) if config.rollout.environment else one_turn


def scored_length(config: Config) -> int:
    """Tokens of the longest sequence that the teacher may see: its own prompt, and the student's answer."""
    teacher, rollout = config.model.teacher, config.rollout
    if config.data.teacher_context is None and teacher.chat_template is None and not teacher.chat_template_kwargs:
        return needed_length(config)
    answer = rollout.max_new_tokens if rollout.max_turns == 1 else rollout.max_sequence_length
    return max(needed_length(config), max_teacher_prompt_tokens(config) + answer)


def validates(config: Config) -> bool:
    """Whether anything is validated."""
    times = config.eval.period or config.eval.at_start or config.eval.at_end
    return bool(config.data.validation and times)


def needs_sampler(config: Config) -> bool:
    """Whether the student has an engine: a replay asks it only where something is validated."""
    return config.rollout.replay is None or validates(config)


def needs_scorer(config: Config) -> bool:
    """Whether the teacher has one: a replay asks it for its accuracy, and about the answers that are recorded."""
    settings = config.eval
    return config.rollout.replay is None or (validates(config) and (settings.teacher or settings.record_samples > 0))


def updates_per_step(config: Config) -> int:
    """Optimizer steps of a step."""
    return config.rollout.prompts_per_step * config.rollout.generations_per_prompt // config.train.global_batch_size


def parse_duration(text: str) -> float | None:
    """Seconds of DD:HH:MM:SS; None where it is none."""
    fields = text.split(":")
    if len(fields) != 4 or not all(field.isdecimal() for field in fields):
        return None
    days, hours, minutes, seconds = map(int, fields)
    if hours >= 24 or minutes >= 60 or seconds >= 60:
        return None
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def micro_batches_per_update(config: Config, *, num_ranks: int) -> int:
    """Forward and backward passes of a rank for an optimizer step, where every sequence is as long as may be."""
    shares = num_ranks // (config.mesh.tensor * config.mesh.context)
    most_tokens = config.train.global_batch_size * config.rollout.max_sequence_length
    return math.ceil(most_tokens / shares / config.train.micro_batch_tokens)
