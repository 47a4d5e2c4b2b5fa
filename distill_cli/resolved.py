"""What a config comes to on this machine, with these models and this data: worked out once, before anything starts.

Preflight makes a `ResolvedRun` and writes it as resolved.json beside config.yaml. Ranks, evaluation, export and resume
read it instead of deriving folders, vocabularies, ranks and lengths from the config again.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.models.model_files import ModelFiles


@dataclass(frozen=True)
class SharedVocabulary:
    """The token ids that student and teacher share."""

    size: int
    """Ids from here on occur nowhere."""
    limit: int | None
    """`size` if one of the models has ids from there on; None if there is nothing to leave out."""
    merged_eos_ids: tuple[int, ...]
    """End-of-sequence tokens of either model that the loss takes for one (`model.eos_map`); empty if they agree."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run."""

    num_nodes: int
    per_node: int
    on_gpus: bool

    @property
    def total(self) -> int:
        return self.num_nodes * self.per_node


@dataclass(frozen=True)
class Lengths:
    """Tokens, at most."""

    prompt: int
    teacher_prompt: int
    validation: int
    """A sequence in validation or evaluation."""
    student: int
    """A sequence in the student's engine."""
    teacher: int
    """A sequence in the teacher's engine."""


@dataclass(frozen=True)
class PredictedMemory:
    """The peak of one rank, in bytes (see `memory`)."""

    peak: int
    parts: dict[str, int]
    """Trainer's parts and engines; on a GPU of unknown size without the engines that take a share of it."""
    moment: str
    """When the trainer holds most."""
    asleep: tuple[str, ...]
    """Engines that give their memory back while the student trains."""


@dataclass(frozen=True)
class ResolvedRun:
    """A checked config and everything that follows from it."""

    config: Config
    student: ModelFiles
    teacher: ModelFiles | None
    """None if no teacher is asked: a replay, or the evaluation of a student."""
    tokenizer: ModelFiles
    """Whose tokenizer prompts are rendered with: the student, unless `model.tokenizer` names another."""
    vocabulary: SharedVocabulary
    ranks: Ranks
    lengths: Lengths
    num_steps: int
    """At most; fewer if prompts are left out of the data."""
    num_train_rows: int | None
    """None if the source is streamed."""
    num_validation_rows: int | None
    num_recorded_steps: int | None
    """Steps that a replay trains on; None if it is none."""
    recorded_run: Path | None
    """Folder of the run that a replay trains on; None if it is none."""
    memory: PredictedMemory | None
    no_memory: str | None
    """Why there is no prediction; None if there is one."""
    warnings: tuple[str, ...]

    def model(self, role: str) -> ModelFiles:
        """Return the files of `student` or `teacher`."""
        found = getattr(self, role)
        assert found is not None, f"the run asks no {role}"
        return found

    def write(self, run: RunDir) -> None:
        """Write resolved.json. The config is in config.yaml, beside it."""
        content = dataclasses.asdict(dataclasses.replace(self, config=None))  # type: ignore[arg-type]
        content.pop("config")
        write_json(run.resolved, json.loads(json.dumps(content, default=str)))

    @classmethod
    def read(cls, run: RunDir, *, needs_teacher: bool = True) -> ResolvedRun:
        """Read resolved.json and config.yaml, with model folders as they are on this machine.

        Args:
            needs_teacher: False does not look for the teacher, which may be gone.

        Raises:
            ConfigError: a file is missing or damaged, or a model is not there.
        """
        config = load_config(run.config)
        try:
            content = json.loads(run.resolved.read_text())
            found = _build(cls, {**content, "config": config})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run.resolved}: cannot be read ({error}); `distill resume` writes it anew") from error
        student = found.student.on_this_machine(key="model.student.path")
        teacher = found.teacher
        if teacher is not None and needs_teacher:
            teacher = teacher.on_this_machine(key="model.teacher.path")
        tokenizer = found.tokenizer.on_this_machine(key="model.tokenizer")
        return dataclasses.replace(found, student=student, teacher=teacher, tokenizer=tokenizer)


def _build(kind: Any, value: Any) -> Any:
    """Return a JSON value as the annotated type: a dataclass, a path, a tuple, an optional."""
    if isinstance(kind, types.UnionType):
        (inner,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        return None if value is None else _build(inner, value)
    if kind is Path:
        return Path(value)
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    return value
