"""Values that several keys decide together, worked out in one place."""

from __future__ import annotations

from distill_cli.config.schema import Config, EngineModelConfig


def max_prompt_tokens(config: Config) -> int:
    """What `data.max_prompt_tokens` says, or the room that the longest answer leaves."""
    return config.data.max_prompt_tokens or config.rollout.max_sequence_length - config.rollout.max_new_tokens


def needed_length(config: Config) -> int:
    """Tokens of the longest sequence that an engine may see, in training or in validation."""
    validation = max_prompt_tokens(config) + (config.eval.max_new_tokens or config.rollout.max_new_tokens)
    return max(config.rollout.max_sequence_length, validation)


def engine_length(config: Config, engine: EngineModelConfig) -> int:
    """What `engine.<role>.max_model_len` says, or what is needed."""
    return engine.max_model_len or needed_length(config)


def updates_per_step(config: Config) -> int:
    """Optimizer steps of a step."""
    return config.rollout.prompts_per_step * config.rollout.generations_per_prompt // config.train.global_batch_size
