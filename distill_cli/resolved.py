"""The facts that follow from a config on this machine, with its models and data: made once, read by all ranks.

Preflight makes a `ResolvedRun` and writes it as resolved.json next to config.yaml. Ranks, evaluation, export and resume
read it instead of deriving folders, vocabularies, ranks and lengths from the config again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_cli.config import derived
from distill_cli.config.schema import Config
from distill_cli.config.teachers import ONLY, path_key, teacher_configs
from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.models.model_files import ModelFiles


@dataclass(frozen=True)
class SharedVocabulary:
    """The token ids that student and teacher share."""

    size: int
    """Ids below it may occur; no others do."""
    limit: int | None
    """`size` if a model has further ids, which sampling and loss leave out; else None."""
    merged_eos_ids: tuple[int, ...]
    """End-of-sequence tokens of either model that the loss merges (`model.eos_map`); empty if the models agree."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run."""

    num_nodes: int
    per_node: int
    on_gpus: bool
    samplers: int = 0
    """Ranks that sample alone, after those that train (`cluster.roles`)."""
    scorers: tuple[int, ...] = ()
    """Ranks that score alone after these, by teacher: 0 for one that scores on the ranks that train."""

    @property
    def total(self) -> int:
        return self.num_nodes * self.per_node

    @property
    def trainers(self) -> int:
        return self.total - self.samplers - sum(self.scorers)


@dataclass(frozen=True)
class Lengths:
    """Greatest lengths in tokens."""

    prompt: int
    teacher_prompt: int
    validation: int
    """Length of a sequence in validation or evaluation."""
    student: int
    """Length of a sequence in the student's engine."""
    teacher: int
    """Length of a sequence in the teacher's engine."""


@dataclass(frozen=True)
class PredictedMemory:
    """The predicted peak of one rank, in bytes (see `memory`)."""

    peak: int
    parts: dict[str, int]
    """The trainer's parts and the engines; on a GPU of unknown size without engines that take a share of it."""
    moment: str
    """The moment of an update at which the trainer holds most."""
    asleep: tuple[str, ...]
    """Engines that free their memory while the student trains."""


@dataclass(frozen=True)
class ResolvedRun:
    """A checked config and everything that follows from it."""

    config: Config
    student: ModelFiles
    teachers: dict[str, ModelFiles]
    """By name, in the config's order; empty if the run needs no teacher: a replay, or the evaluation of a student."""
    tokenizer: ModelFiles
    """The model whose tokenizer renders the prompts: the student, unless `model.tokenizer` names another."""
    vocabulary: SharedVocabulary
    ranks: Ranks
    lengths: Lengths
    num_steps: int
    """Training steps, at most; fewer if prompts of the data are left out."""
    num_train_rows: int | None
    """Rows of the training data; None if the source is streamed."""
    num_validation_rows: int | None
    num_recorded_steps: int | None
    """Recorded steps of a replay; None in other runs."""
    recorded_run: Path | None
    """Folder of the run that a replay trains on; None in other runs."""
    memory: PredictedMemory | None
    no_memory: str | None
    """Reason why `memory` is None."""
    warnings: tuple[str, ...]
    servers: dict[str, str] = field(default_factory=dict)
    """By name, the kind of servers of each teacher that has some (`engines.server_info.ServerKind.name`)."""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """By name, what is known of each teacher's own tokenizer (`jobs.other_tokens`)."""

    def model(self, role: str) -> ModelFiles:
        """Return the files of the model with the role `student` or `teacher`, which must be the only one."""
        return self.student if role == "student" else self.teachers[ONLY]

    def by_teacher(self) -> dict[str, ResolvedRun]:
        """Return, by name, the run with each teacher alone (see `config.teachers`)."""
        return {name: self._alone(name, config) for name, config in teacher_configs(self.config).items()}

    def _alone(self, name: str, config: Config) -> ResolvedRun:
        teachers = {ONLY: self.teachers[name]} if name in self.teachers else {}
        lengths = dataclasses.replace(
            self.lengths,
            teacher_prompt=teacher_prompt_length(config, self.teachers.get(name)),
            teacher=scored_length(config, self.teachers.get(name)),
        )
        servers = {ONLY: self.servers[name]} if name in self.servers else {}
        alone = dataclasses.replace(self, config=config, lengths=lengths, teachers=teachers, servers=servers)
        if not config.model.teacher.has_own_tokenizer or name not in self.teachers:
            return alone
        return dataclasses.replace(alone, vocabulary=SharedVocabulary(self.teachers[name].vocab_size, None, ()))

    def write(self, run: RunDir) -> None:
        """Write resolved.json, and copies of the files of served teachers. config.yaml has the config."""
        content = {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}
        for name, alone in teacher_configs(self.config).items():
            if name in self.teachers and alone.model.teacher.addresses:
                folder = run.teachers / name
                if folder != self.teachers[name].folder:
                    shutil.copytree(self.teachers[name].folder, folder, dirs_exist_ok=True)
                content["teachers"][name]["folder"] = folder
        write_json(run.resolved, json.loads(json.dumps(content, default=str)))

    @classmethod
    def read(cls, run: RunDir, *, needs_teacher: bool = True) -> ResolvedRun:
        """Read resolved.json and config.yaml, with the models' folders on this machine.

        Args:
            needs_teacher: False does not look for the teacher, which may have been deleted.

        Raises:
            ConfigError: a file is missing or damaged, or a model cannot be found.
        """
        config = load_config(run.config)
        try:
            resolved = _build(cls, {**json.loads(run.resolved.read_text()), "config": config})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run.resolved}: cannot be read ({error}); `distill resume` writes it anew") from error
        keys = {"student": "model.student.path", "tokenizer": "model.tokenizer"}
        moved: dict[str, Any] = {name: getattr(resolved, name).on_this_machine(key=key) for name, key in keys.items()}
        if needs_teacher:
            found = resolved.teachers.items()
            moved["teachers"] = {name: files.on_this_machine(key=path_key(name)) for name, files in found}
        return dataclasses.replace(resolved, **moved)


def recorded_vocabulary(run: RunDir) -> SharedVocabulary | None:
    """Return what resolved.json says of the vocabulary, whatever became of the models; None if it cannot be read."""
    try:
        found: SharedVocabulary = _build(SharedVocabulary, read_json(run.resolved)["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def scored_length(config: Config, teacher: ModelFiles | None) -> int:
    """Return the tokens of the longest sequence in the engine of a run's only teacher."""
    if (given := config.engine.teacher.max_model_len) is not None:
        return given
    needed, most = derived.scored_length(config), None if teacher is None else teacher.max_positions
    # What a teacher with a tokenizer of its own cannot read is left out of the loss.
    return min(needed, most) if config.model.teacher.has_own_tokenizer and most is not None else needed


def teacher_prompt_length(config: Config, teacher: ModelFiles | None) -> int:
    """Return the tokens of the longest prompt of a run's only teacher."""
    limit = derived.max_teacher_prompt_tokens(config)
    # Its sequences may be cut, but not within the prompt.
    return min(limit, scored_length(config, teacher) - 1) if config.model.teacher.has_own_tokenizer else limit


def _build(kind: Any, value: Any) -> Any:
    """Return a JSON value as the annotated type `kind`: a dataclass, a path, a tuple, an optional."""
    if isinstance(kind, types.UnionType):
        (inner,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        return None if value is None else _build(inner, value)
    if kind is Path:
        return Path(value)
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    if typing.get_origin(kind) is dict:
        return {name: _build(typing.get_args(kind)[1], item) for name, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    return value
