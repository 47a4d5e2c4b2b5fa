"""Checks of the models: names in the config, vocabularies, end tokens, chat templates, lengths, layouts. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distill_cli.config.derived import needed_length, scored_length, validation_length
from distill_cli.config.schema import Config, EosMap
from distill_cli.data.registry import resolve_environment, resolve_verifier
from distill_cli.engines.process_setup import hide_broken_packages
from distill_cli.models import lora_names, model_files
from distill_cli.models.model_files import ModelFiles
from distill_cli.models.model_pair import (
    OWN_TEMPLATE,
    Vocabularies,
    read_template,
    render,
    special_tokens,
    template_difference,
)
from distill_cli.types import Example

if TYPE_CHECKING:
    from distill_cli.jobs.preflight import Facts


def names(facts: Facts) -> Iterator[str]:
    """Verifier, environment and templates must exist. Raises ConfigError."""
    config = facts.config
    if config.data.verifier is not None:
        resolve_verifier(config.data.verifier)
    if config.rollout.environment is not None:
        resolve_environment(config.rollout.environment)
    for key, template in (
        ("model.chat_template", config.model.chat_template),
        ("model.teacher.chat_template", config.model.teacher.chat_template),
    ):
        is_own = template == OWN_TEMPLATE and key == "model.teacher.chat_template"
        if template is not None and not is_own and "{" not in template and not Path(template).is_file():
            yield f"{key}={template}: no such file, and no template either: those have {{{{ }}}} in them"


def templates(facts: Facts) -> None:
    """Render the first row with each template of the config; ranks do it with all rows. Raises ConfigError."""
    model, sample = facts.config.model, facts.data.sample
    given = [
        ("model.chat_template", model.chat_template, model.chat_template_kwargs),
        (
            "model.teacher.chat_template",
            model.teacher.chat_template,
            {**model.chat_template_kwargs, **model.teacher.chat_template_kwargs},
        ),
    ]
    for key, template, kwargs in given:
        if sample is not None and template is not None and "{" in (text := read_template(template)):
            tokens = special_tokens(facts.tokenizer.folder)
            render(f"{key}: it", text, _sample_messages(facts.config, sample), tokens, kwargs)


def _sample_messages(config: Config, sample: Example) -> list[dict[str, str]]:
    user = config.data.prompt_template.replace("{question}", sample.question)
    messages = [*(dict(message) for message in sample.messages[:-1]), {"role": "user", "content": user}]
    if config.data.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.data.system_prompt})
    return messages


def pair(facts: Facts) -> Iterator[str]:
    """Student and teacher must share a vocabulary; other differences between them are warnings."""
    config, student, teacher, tokenizer = facts.config, facts.student, facts.teacher, facts.tokenizer
    if config.model.tokenizer:
        other = Vocabularies.of(tokenizer.folder, student.folder).problem()
        if other:
            yield f"model.tokenizer={config.model.tokenizer}: not the student's vocabulary: {other}; leave it out"
    facts.pair = Vocabularies.of(student.folder, teacher.folder, tokenizer=tokenizer.folder)
    problem = facts.pair.problem()
    if problem:
        yield (
            f"model.teacher.path={config.model.teacher.path}: its vocabulary is not the student's "
            f"({config.model.student.path}): {problem}; choose a pair with the same tokenizer"
        )
    size = min(*facts.pair.sizes, facts.pair.limit or math.inf)
    if config.loss.topk > size:
        yield f"loss.topk={config.loss.topk}: must be at most the vocabulary of {size}"
    for role, model, length in (
        ("student", student, needed_length(config)),
        ("teacher", teacher, scored_length(config)),
    ):
        if model.max_positions is not None and length > model.max_positions:
            yield (
                f"rollout.max_sequence_length={config.rollout.max_sequence_length}, "
                f"eval.max_new_tokens={config.eval.max_new_tokens}, "
                f"data.max_teacher_prompt_tokens={config.data.max_teacher_prompt_tokens}: sequences of up to {length} "
                f"tokens, and the {role} has {model.max_positions} positions; lower the largest"
            )
    facts.warnings += _pair_warnings(facts)


def _pair_warnings(facts: Facts) -> Iterator[str]:
    config, student, teacher, tokenizer = facts.config, facts.student, facts.teacher, facts.tokenizer
    for folder in {tokenizer.folder, teacher.folder}:
        if model_files.vocabulary(folder) is None:
            yield f"{folder} has no tokenizer.json: that its vocabulary fits the other's could not be checked"
    if warning := facts.pair.warning():
        yield warning
    if student.eos_ids != teacher.eos_ids:
        what = f"the student ends with tokens {list(student.eos_ids)} and the teacher with {list(teacher.eos_ids)}"
        if config.model.eos_map is EosMap.auto:
            yield (
                f"{what}: model.eos_map=auto takes these for one: sampling stops at any of them, and the loss compares "
                "the probability of ending"
            )
        else:
            yield f"{what}: with model.eos_map=off the student may learn not to stop; choose auto"
    if facts.data and facts.data.sample and config.model.teacher.chat_template is config.model.chat_template is None:
        messages = _sample_messages(config, facts.data.sample)
        folders = (tokenizer.folder, teacher.folder)
        if difference := template_difference(*folders, messages, **config.model.chat_template_kwargs):
            yield (
                f"student and teacher have different chat templates, {difference}; both read the student's unless "
                "model.teacher.chat_template=own"
            )


def merged_eos_ids(config: Config, student: ModelFiles, teacher: ModelFiles) -> tuple[int, ...]:
    """Return the end-of-sequence tokens that the loss takes for one, the student's first; empty if the models agree.

    They end an answer, and the loss compares the probability of any of them.
    """
    if config.model.eos_map is EosMap.off or student.eos_ids == teacher.eos_ids:
        return ()
    return (*student.eos_ids, *sorted({*teacher.eos_ids} - {*student.eos_ids}))


def positions(facts: Facts) -> Iterator[str]:
    """Prompt and answer of an evaluation must fit the model."""
    length, model = validation_length(facts.config), facts.student
    if model.max_positions is not None and length > model.max_positions:
        yield (
            f"{model.path}: has {model.max_positions} positions, and prompt and answer may take {length}; lower "
            "eval.max_new_tokens, or data.max_prompt_tokens"
        )


def tensor_parallel(facts: Facts) -> None:
    """The student must divide over mesh.tensor ranks. Raises ConfigError. Imports torch if there is more than one."""
    config = facts.config
    if config.mesh.tensor <= 1:
        return
    hide_broken_packages()
    from transformers import AutoConfig
    from transformers.utils.logging import set_verbosity_error

    from distill_cli.parallel.tensor import check_sizes, matrix_plan

    set_verbosity_error()  # problems are reported below, in one line
    folder = facts.student.folder
    model = AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code).get_text_config()
    matrix_plan(model)
    check_sizes(model, config.mesh.tensor)


def adapters(facts: Facts) -> Iterator[str]:
    """The student must have the layers that adapters are asked for. Raises ConfigError."""
    settings = facts.config.model.student.lora
    if not settings.is_on:
        return
    layers = lora_names.targeted(model_files.shapes(facts.student.folder), settings.targets)
    most = max(min(shape) for shape in layers.values())
    if settings.rank > most:
        yield f"model.student.lora.rank={settings.rank}: no matrix that it is for has a rank above {most}; lower it"
