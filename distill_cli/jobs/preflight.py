"""Check a config before an engine starts, and resolve it. No torch.

Checks run in order. Each yields problems and may note facts and warnings for those after it. A check names the facts
that it reads as parameters; it is skipped if one of them is None, which another check has reported. All problems are
raised at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_cli.config import derived
from distill_cli.config.checks import config_problems, evaluation_problems
from distill_cli.config.schema import Config
from distill_cli.data.recorded_run import Recording
from distill_cli.data.row_check import DataFacts, check_data
from distill_cli.errors import ConfigError
from distill_cli.jobs import machine_checks, model_checks
from distill_cli.jobs.replay_checks import check_recording
from distill_cli.launch.node_paths import use_hub_cache
from distill_cli.models.model_files import ModelFiles
from distill_cli.resolved import Lengths, PredictedMemory, Ranks, ResolvedRun, SharedVocabulary
from distill_cli.track.base import tracker_problems


@dataclass
class Facts:
    """Facts that the checks have established so far; None if not known yet, or not needed."""

    config: Config
    roles: tuple[str, ...]
    """The models that get an engine: `student`, `teacher`."""
    known_data: dict[str, DataFacts]
    """Data facts of earlier calls (see `check_data`)."""
    student: ModelFiles | None = None
    teacher: ModelFiles | None = None
    tokenizer: ModelFiles | None = None
    ranks: Ranks | None = None
    data: DataFacts | None = None
    recording: Recording | None = None
    vocabulary: SharedVocabulary | None = None
    memory: PredictedMemory | None = None
    no_memory: str | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def named_by(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the facts that are parameters of a function; the parameter `facts` is all of them."""
        names = inspect.signature(function).parameters
        return {name: self if name == "facts" else getattr(self, name) for name in names}


Check = Callable[..., Iterator[str] | None]


def preflight(config: Config, known_data: dict[str, DataFacts] | None = None) -> ResolvedRun:
    """Check a composed config against the machine, the models and the data.

    Args:
        known_data: data facts of earlier calls; the runs of a sweep mostly share their data.

    Raises:
        ConfigError: with all problems.
    """
    needed = {"student": derived.needs_sampler(config), "teacher": derived.needs_scorer(config)}
    roles = tuple(role for role, is_needed in needed.items() if is_needed)
    problems = [*config_problems(config), *tracker_problems(config)]
    return run_checks(Facts(config, roles, {} if known_data is None else known_data, problems=problems), CHECKS)


def preflight_evaluation(config: Config, *, role: str) -> ResolvedRun:
    """Check an evaluation of `model.<role>`, which trains nothing. Raises ConfigError with all problems."""
    return run_checks(Facts(config, (role,), {}, problems=evaluation_problems(config)), EVALUATION_CHECKS)


def run_checks(facts: Facts, checks: Sequence[Check]) -> ResolvedRun:
    """Run the checks whose facts are known; return the checked run. Raises ConfigError with all problems."""
    for check in checks:
        arguments = facts.named_by(check)
        if all(value is not None for value in arguments.values()):
            try:
                facts.problems += check(**arguments) or ()
            except ConfigError as error:
                facts.problems += error.problems
    if facts.problems:
        raise ConfigError(*dict.fromkeys(facts.problems))
    return resolve(**facts.named_by(resolve))


def resolve(
    facts: Facts, config: Config, student: ModelFiles, tokenizer: ModelFiles, ranks: Ranks, data: DataFacts
) -> ResolvedRun:
    """Return the facts as one frozen record."""
    recording = facts.recording
    return ResolvedRun(
        config=config,
        student=student,
        teacher=facts.teacher,
        tokenizer=tokenizer,
        vocabulary=facts.vocabulary or SharedVocabulary(student.vocab_size, None, ()),
        ranks=ranks,
        lengths=Lengths(
            prompt=derived.max_prompt_tokens(config),
            teacher_prompt=derived.max_teacher_prompt_tokens(config),
            validation=derived.validation_length(config),
            student=config.engine.student.max_model_len or derived.needed_length(config),
            teacher=config.engine.teacher.max_model_len or derived.scored_length(config),
        ),
        num_steps=num_steps(config, data, recording),
        num_train_rows=data.num_train,
        num_validation_rows=data.num_validation,
        num_recorded_steps=recording.num_steps if recording else None,
        recorded_run=recording.folder.parent if recording else None,
        memory=facts.memory,
        no_memory=facts.no_memory,
        warnings=tuple(dict.fromkeys(facts.warnings)),
    )


def num_steps(config: Config, data: DataFacts, recording: Recording | None) -> int:
    """Return the run's steps: max_steps, or fewer if max_epochs ends first."""
    train, epoch = config.train, recording.num_steps if recording else None
    if epoch is None and data.num_train is not None:
        epoch = data.num_train // config.rollout.prompts_per_step
    return train.max_steps if epoch is None else min(train.max_steps, train.max_epochs * epoch)


def find_student(facts: Facts, config: Config) -> None:
    model = config.model
    facts.student = ModelFiles.find(model.student.path, revision=model.student.revision, key="model.student.path")
    other = model.tokenizer
    facts.tokenizer = facts.student if other is None else ModelFiles.find(other, key="model.tokenizer")


def find_teacher(facts: Facts, config: Config) -> None:
    teacher = config.model.teacher
    if "teacher" in facts.roles:
        facts.teacher = ModelFiles.find(teacher.path, revision=teacher.revision, key="model.teacher.path")


def read_data(facts: Facts, config: Config) -> Iterator[str]:
    facts.data = check_data(config, facts.known_data, trains_on_rows=config.rollout.replay is None)
    facts.warnings += facts.data.warnings
    rows, prompts = facts.data.num_train, config.rollout.prompts_per_step
    if rows is not None and 0 < rows < prompts:
        fix = "lower it (and train.global_batch_size), or give more"
        yield f"rollout.prompts_per_step={prompts}: the training data has only {rows} rows; {fix}"


def read_recording(facts: Facts, config: Config) -> None:
    if config.rollout.replay is not None:
        facts.recording = recording = Recording.of(config.rollout.replay)
        size, merged_eos_ids = recording.facts.vocab_size, tuple(recording.facts.merged_eos_ids)
        facts.vocabulary = SharedVocabulary(size, size, merged_eos_ids)  # the recorded teacher may be gone


COMMON_CHECKS: tuple[Check, ...] = (
    machine_checks.cluster,
    use_hub_cache,
    machine_checks.ranks,
    find_student,
    find_teacher,
    read_data,
    model_checks.names,
    machine_checks.engines,
)
EVALUATION_CHECKS: tuple[Check, ...] = (*COMMON_CHECKS, model_checks.positions)
CHECKS: tuple[Check, ...] = (
    *COMMON_CHECKS,
    read_recording,
    check_recording,
    model_checks.templates,
    model_checks.pair,
    model_checks.tensor_parallel,
    model_checks.adapters,
    machine_checks.offload,
    machine_checks.memory,
    machine_checks.disk,
)
