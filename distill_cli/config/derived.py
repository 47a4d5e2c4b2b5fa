"""Compute the values that follow from several keys of the config alone."""

import math
import re
from collections.abc import Iterator

from distill_cli.config.execution_schema import Roles
from distill_cli.config.schema import Config, Dtype, Precision
from distill_cli.config.teachers import engine_key, teacher_configs


def max_prompt_tokens(config: Config) -> int:
    """Return `data.max_prompt_tokens`, or what the longest answer leaves of a sequence."""
    return config.data.max_prompt_tokens or config.rollout.max_sequence_length - config.rollout.longest_answer


def max_teacher_prompt_tokens(config: Config) -> int:
    """Return `data.max_teacher_prompt_tokens`, or its default: the student's limit, or a sequence if it has context."""
    if config.data.max_teacher_prompt_tokens is not None:
        return config.data.max_teacher_prompt_tokens
    if config.data.teacher_context is not None:
        return config.rollout.max_sequence_length
    return max_prompt_tokens(config) * (OWN_LENGTH if config.model.teacher.has_own_tokenizer else 1)


OWN_LENGTH = 2
"""Tokens of a teacher with a tokenizer of its own for each of the student's, at most: what is longer is left out."""


def max_engine_mismatch(config: Config) -> float:
    """Return the limit of `rollout/engine_mismatch` (`rollout.max_engine_mismatch`)."""
    if (given := config.rollout.max_engine_mismatch) is not None:
        return given
    is_exact = config.model.student.dtype is Dtype.float32 and config.train.precision is Precision.fp32
    return 1e-3 if is_exact else 0.1


def needed_length(config: Config) -> int:
    """Return the tokens of the longest sequence that the student's engine may see, in training or validation."""
    return max(config.rollout.max_sequence_length, validation_length(config))


def validation_length(config: Config) -> int:
    """Return the tokens of the longest sequence in validation."""
    one_turn = max_prompt_tokens(config) + (config.eval.max_new_tokens or config.rollout.longest_answer)
    return max(one_turn, config.rollout.max_sequence_length) if config.rollout.environment else one_turn


def scored_length(config: Config) -> int:
    """Return the tokens of the longest sequence that the teacher may see: its own prompt and the student's answer."""
    teacher, rollout = config.model.teacher, config.rollout
    answer = rollout.longest_answer if rollout.max_turns == 1 else rollout.max_sequence_length
    if teacher.has_own_tokenizer:
        longest = max(answer, config.eval.max_new_tokens or 0)
        return max_teacher_prompt_tokens(config) + OWN_LENGTH * longest
    if config.data.teacher_context is None and teacher.chat_template is None and not teacher.chat_template_kwargs:
        return needed_length(config)
    return max(needed_length(config), max_teacher_prompt_tokens(config) + answer)


def validates(config: Config) -> bool:
    """Whether the run measures its accuracy on validation's answers."""
    is_judged = config.data.validation and config.data.verifier is not None
    return bool(is_judged and (config.eval.period or config.eval.at_start or config.eval.at_end))


def needs_sampler(config: Config) -> bool:
    """Whether the student has an engine: in a replay only for validation."""
    return config.rollout.replay is None or validates(config)


def needs_scorer(config: Config) -> bool:
    """Whether the teacher has an engine: in a replay only for its accuracy and for recorded samples."""
    is_asked = config.eval.teacher or config.eval.record_samples > 0
    return config.rollout.replay is None or (validates(config) and is_asked)


def needs_hidden(config: Config) -> bool:
    """Whether teachers return their hidden states: the loss needs them, or they are recorded."""
    return config.loss.needs_hidden or config.rollout.saves_hidden


def num_sampling_ranks(config: Config) -> int:
    """Return the number of ranks that sample alone: none if all ranks do everything, or in a replay."""
    if config.cluster.roles is Roles.shared or config.rollout.replay is not None:
        return 0
    return config.engine.student.ranks or config.engine.student.tensor_parallel


def scoring_ranks(config: Config) -> dict[str, int]:
    """Return the number of ranks that score alone, by teacher: 0 for one whose engines are with the trainer."""
    is_split, found = num_sampling_ranks(config) > 0, dict[str, int]()
    for name, one in teacher_configs(config).items():
        has_ranks = is_split and one.model.teacher.has_engine
        found[name] = (one.engine.teacher.ranks or 0) if has_ranks else 0
    return found


def scores_while_sampling(config: Config, *, on_gpus: bool) -> bool:
    """Whether answers are scored as they end; `overlap_problems` says why they cannot be."""
    given = config.rollout.score_while_sampling
    if config.rollout.staleness or num_sampling_ranks(config):
        return False
    return (on_gpus and not any(overlap_problems(config, on_gpus=on_gpus))) if given is None else given


def overlap_problems(config: Config, *, on_gpus: bool) -> Iterator[str]:
    """Yield what keeps the teacher from scoring while the student samples, and the key that changes it."""
    local = {name: one for name, one in teacher_configs(config).items() if one.model.teacher.has_engine}
    teachers = {engine_key(name): one.engine.teacher for name, one in local.items()}
    for key, engine in teachers.items():
        if on_gpus and engine.sleep is not False:
            yield f"the teacher sleeps meanwhile; set {key}.sleep=false"
    for key, engine in {"engine.student": config.engine.student, **teachers}.items():
        if engine.tensor_parallel > 1:
            yield f"each engine must have one rank; set {key}.tensor_parallel=1"


def ends_by_epochs(config: Config) -> bool:
    """Whether train.max_epochs may end the run: how many prompts a step takes is known."""
    return not config.rollout.carry_over or config.rollout.replay is not None


def updates_per_step(config: Config) -> int:
    """Return the optimizer updates per training step."""
    return config.rollout.num_sequences // config.train.global_batch_size


def micro_batches_per_update(config: Config, *, num_ranks: int) -> int:
    """Return a rank's forward and backward passes per optimizer update if all sequences have the greatest length."""
    shares = num_ranks // (config.mesh.tensor * config.mesh.context)
    most_tokens = config.train.global_batch_size * config.rollout.max_sequence_length
    return math.ceil(most_tokens / shares / config.train.micro_batch_tokens)


def parse_duration(text: str) -> float | None:
    """Parse DD:HH:MM:SS to seconds; None if malformed."""
    if (match := re.fullmatch(r"(\d+):([01]?\d|2[0-3]):([0-5]?\d):([0-5]?\d)", text)) is None:
        return None
    days, hours, minutes, seconds = map(int, match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
