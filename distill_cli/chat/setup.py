"""What `distill chat` was typed with: the models that answer, and the teacher that they are compared with. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from distill_cli.config.choices import nearest
from distill_cli.config.compose import check_overrides, compose
from distill_cli.config.derived import OWN_LENGTH
from distill_cli.config.fields import has_property, is_within
from distill_cli.config.schema import Config, MeshConfig
from distill_cli.config.teachers import engine_key, teacher_configs, teacher_names
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError, collect, refuse
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.chat_checks import preflight_chat, preflight_teacher
from distill_cli.jobs.named_models import BEFORE, Contender, config_here, find, is_run, run_around
from distill_cli.jobs.new_runs import require_here
from distill_cli.resolved import ResolvedRun, SharedVocabulary, recorded_vocabulary
from distill_cli.terminal.console import Console

CONTEXT = 8192
"""Tokens of a conversation unless engine.<role>.max_model_len is given, a run's sequences are longer, or the model's
shorter: models have up to a million positions, whose KV cache fits no device."""
UNREAD = ("data.train", "data.validation")
"""Dictionaries that a chat does not read."""
READ = (
    *("model", "experiment", "loss", "data.prompt_template", "data.system_prompt", "train.seed"),
    *("engine.student.max_model_len", "engine.teacher.max_model_len"),
    *(f"rollout.{name}" for name in ("temperature", "top_p", "top_k", "stop", "stop_token_ids", "max_new_tokens")),
)
"""Groups and keys that are read, with those of `engine` and `cluster` that an evaluation reads."""
NOT_READ = ("model.student.lora", "model.teacher.nodes", "loss.reward", "loss.penalty", "loss.penalty_share")
"""Keys in these groups that are not."""
HERE = ("cluster.gpus_per_node=null", "cluster.ranks_per_node=null")
"""What differs from a run's config unless it is typed: this machine may be another."""

NO_LENGTHS = {
    **{"rollout.max_new_tokens": 1, "rollout.max_sequence_length": 2, "eval.max_new_tokens": None},
    **{"data.max_prompt_tokens": None, "data.max_teacher_prompt_tokens": None},
}
"""Lengths that every model has: a conversation is as long as it gets."""


@dataclass(frozen=True)
class ChatModel:
    """A model that answers."""

    name: str
    role: str
    """`student` or `teacher`: whose engine settings apply."""
    resolved: ResolvedRun
    """With the model as `model.student`, whatever its role."""
    context: int
    """Tokens of its longest sequence."""

    @property
    def engine_key(self) -> str:
        """The section of its engine."""
        return engine_key(self.name) if self.role == "teacher" else "engine.student"

    @property
    def raise_context(self) -> str:
        """How to get a longer context, as an error's fix."""
        most = self.resolved.student.max_positions
        if most is not None and self.context >= most:
            return f"give a model with more than {most} positions"
        return f"raise {self.engine_key}.max_model_len" + (f" (at most {most})" if most else "")


@dataclass(frozen=True)
class Setup:
    """Everything that was typed, checked."""

    models: tuple[ChatModel, ...]
    """One, or two side by side; the teachers of the first one's config are those to compare with."""
    teacher: str | None
    """The name of the teacher to compare with; None if none is known, or several are."""
    typed: frozenset[str]
    """Keys and groups of the overrides."""

    @property
    def config(self) -> Config:
        return self.models[0].resolved.config

    @property
    def has_teacher_engine(self) -> bool:
        """Whether the teacher gets an engine besides those of the models."""
        if self.teacher is None or any(one.role == "teacher" and one.name == self.teacher for one in self.models):
            return False
        return teacher_configs(self.config)[self.teacher].model.teacher.has_files


@dataclass(frozen=True)
class Pair:
    """A model, and the teacher that its answers are compared with."""

    resolved: ResolvedRun
    alone: ResolvedRun
    """The same with this teacher alone (`config.teachers`)."""

    @property
    def teacher_length(self) -> int:
        """Tokens of the longest sequence that the teacher reads."""
        return self.alone.lengths.teacher


def prepare(
    subject: str,
    overrides: Sequence[str],
    *,
    against: str | None = None,
    step: str | None = None,
    teacher: str | None = None,
    console: Console,
) -> Setup:
    """Find and check the models that were typed.

    Args:
        subject: a run, a model's folder or its name on the hub.
        against: the second model.
        step: which checkpoint of a run.
        teacher: the one to compare with, of several.

    Raises:
        ConfigError: with all problems.
    """
    check_overrides(overrides)
    refuse(unread_problems(overrides))
    run = run_around(subject)
    config = composed(subject, overrides, run)
    require_here(config, "distill chat")
    chosen = chosen_teacher(config, teacher)
    own = (BEFORE, *teacher_names(config))
    refuse(name_problems(subject, against, config, run))
    words = [subject] if against is None else [subject, against]
    if step is not None and not any(is_run(word) for word in words):
        raise ConfigError(f"--step {step}: is a checkpoint of a run, and {subject} is a model; leave it out")
    contenders = [find(word, config, step=step, console=console) for word in words]
    if len(contenders) > 1 and contenders[0].name == contenders[1].name:
        contenders[1] = replace(contenders[1], name=f"{contenders[1].name} (2)")
    recorded = None if run is None else recorded_vocabulary(run)
    vocabularies = [recorded if place == 0 or word in own else None for place, word in enumerate(words)]
    pairs = zip(contenders, vocabularies, strict=True)
    models = collect(partial(chat_model, one, vocabulary=vocabulary) for one, vocabulary in pairs)
    return Setup(tuple(models), chosen, typed_keys(overrides))


def name_problems(subject: str, against: str | None, config: Config, run: RunDir | None) -> Iterator[str]:
    """Yield why a name stands for no model."""
    names = teacher_names(config)
    if subject in (BEFORE, *names) and not Path(subject).exists():
        yield f"{subject}: is a model of a run; give the run, and --against {subject}"
    if against == BEFORE and run is None:
        yield f"--against before: is a run's student before training, and {subject} is no run; give a run"
    elif against is not None and against in names and not has_teacher(config):
        yield f"--against {against}: no teacher is known; give a run, or set model.teacher.path"


def composed(subject: str, overrides: Sequence[str], run: RunDir | None) -> Config:
    """Return the config of the first model's run, or a composed one; the model is not looked for yet."""
    if run is not None:
        return config_here(run, [*HERE, *overrides], unread=UNREAD)
    chosen = list[str]()
    if not subject.startswith("package://") and not typed_keys(overrides) & {"model", "experiment"}:
        chosen = ["model=custom", f"model.student.path={json.dumps(subject)}"]
    jobs = compose([*chosen, *overrides], unread=UNREAD)
    if len(jobs) != 1:
        raise ConfigError("distill chat: takes no sweep; name a second model with --against")
    return override(jobs[0].config, {"mesh": MeshConfig()})


def typed_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys and groups of overrides."""
    return frozenset(word.lstrip("+~").partition("=")[0] for word in overrides)


def unread_problems(overrides: Sequence[str]) -> Iterator[str]:
    """Yield one line for each override of a key that a chat does not read."""
    for word in overrides:
        (key,) = typed_keys([word])
        is_read = any(is_within(key, name) for name in READ) and not any(is_within(key, name) for name in NOT_READ)
        is_setting = any(is_within(key, name) for name in ("cluster", "engine")) and has_property(
            Config, key, "evaluation"
        )
        if not is_read and not is_setting:
            own = f"rollout.{key.rpartition('.')[2]}"
            yield f"{word}: a chat does not read it; " + (f"set {own}" if own in READ else "leave it out")


def has_teacher(config: Config) -> bool:
    """Whether the config names a teacher."""
    return bool(config.model.teachers or config.model.teacher.path is not None or config.model.teacher.addresses)


def chosen_teacher(config: Config, given: str | None) -> str | None:
    """Return the name of the teacher to compare with; None if none is known, or several are and none was typed.

    Raises:
        ConfigError: there is no teacher of the name.
    """
    names = teacher_names(config) if has_teacher(config) else ()
    if given is not None and given not in names:
        known = f"there are: {', '.join(names)}" if names else "none is known; set model.teacher.path"
        raise ConfigError(f"--teacher {given}: no such teacher{nearest(given, names)} ({known})")
    return given or (names[0] if len(names) == 1 else None)


def chat_model(one: Contender, *, vocabulary: SharedVocabulary | None) -> ChatModel:
    """Check a model and find its files.

    Args:
        vocabulary: what its run shares with the teachers; None if it has none.

    Raises:
        ConfigError: with all problems.
    """
    resolved, is_teacher = preflight_chat(one.config, role=one.role), one.role == "teacher"
    if vocabulary is not None and not (is_teacher and one.config.model.teacher.has_own_tokenizer):
        resolved = replace(resolved, vocabulary=vocabulary)
    given, most = getattr(one.config.engine, one.role).max_model_len, resolved.student.max_positions
    if given is not None and not 2 <= given <= (most or given):
        key = engine_key(one.name) if is_teacher else "engine.student"
        allowed = "at least 2" if most is None else f"from 2 to {most}, the positions of {resolved.student.path}"
        raise ConfigError(f"{key}.max_model_len={given}: must be {allowed}; leave it out")
    wanted = max(CONTEXT, resolved.lengths.student)
    return ChatModel(one.name, one.role, resolved, given or min(wanted, most or wanted))


def pair_of(setup: Setup, model: ChatModel) -> Pair:
    """Find the teacher that a model's answers are compared with. Raises ConfigError with all problems."""
    if setup.teacher is None:
        names = ", ".join(teacher_names(setup.config))
        why = (
            f"give --teacher, one of {names}" if has_teacher(setup.config) else "set model.teacher.path, or give a run"
        )
        raise ConfigError(f"KL: from which teacher? {why}")
    if model.role == "teacher":
        raise ConfigError(f"KL: {model.name} is a teacher itself")
    resolved = preflight_teacher(override(model.resolved.config, NO_LENGTHS))
    alone = resolved.by_teacher()[setup.teacher]
    teacher, files = alone.config.model.teacher, alone.teachers.get("teacher")
    if teacher.moves_apart:
        raise ConfigError(
            "KL: the teacher was the student of earlier steps, whose weights are gone; set model.teacher.path"
        )
    length = model.context * (OWN_LENGTH if teacher.has_own_tokenizer else 1)
    if files is not None and not teacher.addresses:
        length = min(length, files.max_positions or length)
    config = override(
        alone.config, {"engine.teacher.max_model_len": alone.config.engine.teacher.max_model_len or length}
    )
    lengths = replace(alone.lengths, teacher=config.engine.teacher.max_model_len or length)
    return Pair(resolved, replace(alone, config=config, lengths=lengths))
