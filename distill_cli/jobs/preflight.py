"""What can be found wrong before an engine starts, and what the config comes to. No torch.

`CHECKS` run in order. Each yields problems and may note facts and warnings for those after it; a check whose facts are
missing, because another found them wrong, is left out. All problems are raised at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from distill_cli.config import derived
from distill_cli.config.checks import config_problems, evaluation_problems
from distill_cli.config.schema import Config
from distill_cli.data.recorded_run import Recording
from distill_cli.data.row_check import DataFacts, check_data
from distill_cli.errors import ConfigError
from distill_cli.jobs import machine_checks, model_checks, replay_checks
from distill_cli.machine import hardware
from distill_cli.models.model_files import ModelFiles
from distill_cli.models.model_pair import (
    Vocabularies,
)
from distill_cli.resolved import Lengths, PredictedMemory, Ranks, ResolvedRun, SharedVocabulary
from distill_cli.track.base import tracker_problems


@dataclass
class Facts:
    """What the checks have found so far; None if it is not known yet, or not asked."""

    config: Config
    roles: tuple[str, ...]
    """The models that get an engine: `student`, `teacher`."""
    known_data: dict[str, DataFacts]
    """What earlier runs found of their data, by what they asked of it."""
    student: ModelFiles | None = None
    teacher: ModelFiles | None = None
    tokenizer: ModelFiles | None = None
    ranks: Ranks | None = None
    data: DataFacts | None = None
    recording: Recording | None = None
    pair: Vocabularies | None = None
    memory: PredictedMemory | None = None
    no_memory: str | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Check = Callable[[Facts], Iterator[str] | None]


def preflight(config: Config, known_data: dict[str, DataFacts] | None = None) -> ResolvedRun:
    """Check a composed config against the machine, the models and the data.

    Args:
        known_data: what earlier calls found of their data; a sweep's runs mostly have the same.

    Raises:
        ConfigError: with all problems.
    """
    needed = {"student": derived.needs_sampler(config), "teacher": derived.needs_scorer(config)}
    roles = tuple(role for role, is_needed in needed.items() if is_needed)
    problems = [*config_problems(config), *tracker_problems(config)]
    facts = Facts(config, roles, {} if known_data is None else known_data, problems=problems)
    run_checks(facts, CHECKS)
    return resolve(facts)


def preflight_evaluation(config: Config, *, role: str) -> ResolvedRun:
    """Check an evaluation of `model.<role>`, which trains nothing. Raises ConfigError with all problems."""
    facts = Facts(config, (role,), {}, problems=evaluation_problems(config))
    run_checks(facts, EVALUATION_CHECKS)
    return resolve(facts)


def run_checks(facts: Facts, checks: Sequence[tuple[Check, tuple[str, ...]]]) -> None:
    """Run the checks whose facts are there. Raises ConfigError with all problems."""
    for check, needs in checks:
        if all(getattr(facts, need) is not None for need in needs):
            try:
                facts.problems += check(facts) or ()
            except ConfigError as error:
                facts.problems += error.problems
    if facts.problems:
        raise ConfigError(*dict.fromkeys(facts.problems))


def resolve(facts: Facts) -> ResolvedRun:
    """Return what the checks have found as one frozen record."""
    config, data = facts.config, facts.data
    assert facts.student is not None
    assert facts.tokenizer is not None
    assert facts.ranks is not None
    assert data is not None
    return ResolvedRun(
        config=config,
        student=facts.student,
        teacher=facts.teacher,
        tokenizer=facts.tokenizer,
        vocabulary=shared_vocabulary(facts),
        ranks=facts.ranks,
        lengths=Lengths(
            prompt=derived.max_prompt_tokens(config),
            teacher_prompt=derived.max_teacher_prompt_tokens(config),
            validation=derived.validation_length(config),
            student=config.engine.student.max_model_len or derived.needed_length(config),
            teacher=config.engine.teacher.max_model_len or derived.scored_length(config),
        ),
        num_steps=num_steps(facts),
        num_train_rows=data.num_train,
        num_validation_rows=data.num_validation,
        num_recorded_steps=facts.recording and facts.recording.num_steps,
        memory=facts.memory,
        no_memory=facts.no_memory,
        warnings=tuple(dict.fromkeys(facts.warnings)),
    )


def shared_vocabulary(facts: Facts) -> SharedVocabulary:
    """Return the ids that occur in the run: those of the pair, of a recording, or of the only model."""
    if facts.recording is not None:  # its teacher may be gone
        recorded = facts.recording.facts
        return SharedVocabulary(recorded.vocab_size, recorded.vocab_size, tuple(recorded.merged_eos_ids))
    if facts.pair is None:
        return SharedVocabulary(facts.student.vocab_size, None, ())
    limit = facts.pair.limit
    merged = model_checks.merged_eos_ids(facts.config, facts.student, facts.teacher)
    below = tuple(token for token in merged if token < (limit or sys.maxsize))
    return SharedVocabulary(limit or min(facts.pair.sizes), limit, below)


def num_steps(facts: Facts) -> int:
    """Return the run's steps: max_steps, or fewer if max_epochs ends first."""
    train, rows = facts.config.train, facts.data.num_train
    if facts.recording is not None:
        return min(train.max_steps, train.max_epochs * facts.recording.num_steps)
    if rows is None:
        return train.max_steps
    return min(train.max_steps, train.max_epochs * (rows // facts.config.rollout.prompts_per_step))


def find_ranks(facts: Facts) -> None:
    config = facts.config
    gpus = hardware.gpus_per_node(config)
    facts.ranks = Ranks(config.cluster.nodes, hardware.ranks_per_node(config), gpus > 0)


def find_student(facts: Facts) -> None:
    model = facts.config.model
    facts.student = ModelFiles.find(model.student.path, revision=model.student.revision, key="model.student.path")
    if model.tokenizer is None:
        facts.tokenizer = facts.student
    else:
        facts.tokenizer = ModelFiles.find(model.tokenizer, key="model.tokenizer")


def find_teacher(facts: Facts) -> None:
    teacher = facts.config.model.teacher
    if "teacher" in facts.roles:
        facts.teacher = ModelFiles.find(teacher.path, revision=teacher.revision, key="model.teacher.path")


def read_data(facts: Facts) -> Iterator[str]:
    trains_on_rows = facts.config.rollout.replay is None
    facts.data = check_data(facts.config, facts.known_data, trains_on_rows=trains_on_rows)
    facts.warnings += facts.data.warnings
    rows, prompts = facts.data.num_train, facts.config.rollout.prompts_per_step
    if rows is not None and 0 < rows < prompts:
        yield (
            f"rollout.prompts_per_step={prompts}: the training data has only {rows} rows; lower it (and "
            "train.global_batch_size), or give more"
        )


def read_recording(facts: Facts) -> Iterator[str]:
    if facts.config.rollout.replay is not None:
        facts.recording = Recording.of(facts.config.rollout.replay)
        yield from replay_checks.recording_problems(
            facts.recording, facts.config, student=facts.student, tokenizer=facts.tokenizer
        )


CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (machine_checks.cluster, ()),
    (machine_checks.hub_cache, ()),
    (find_ranks, ()),
    (find_student, ()),
    (find_teacher, ()),
    (read_data, ()),
    (model_checks.names, ()),
    (machine_checks.devices, ("ranks",)),
    (read_recording, ("student", "tokenizer")),
    (model_checks.templates, ("tokenizer", "data")),
    (model_checks.pair, ("student", "teacher")),
    (model_checks.tensor_parallel, ("student",)),
    (model_checks.adapters, ("student",)),
    (machine_checks.engines, ("ranks",)),
    (machine_checks.offload, ("ranks",)),
    (machine_checks.memory, ("student", "ranks")),
    (machine_checks.disk, ("student",)),
)
"""Each check with the facts that it needs."""

EVALUATION_CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (machine_checks.cluster, ()),
    (machine_checks.hub_cache, ()),
    (find_ranks, ()),
    (find_student, ()),
    (find_teacher, ()),
    (read_data, ()),
    (model_checks.names, ()),
    (machine_checks.devices, ("ranks",)),
    (machine_checks.engines, ("ranks",)),
    (model_checks.positions, ("student",)),
)
