"""The models that a command line names: a run's student before or after training, its teachers, a folder, a name."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.config.choices import nearest
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.fields import has_property
from distill_cli.config.schema import Config, MeshConfig, StudentModel
from distill_cli.config.teachers import ONLY, teacher_configs, teacher_names
from distill_cli.config.variation import load_config, override
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.attempts import finished_steps
from distill_cli.folders.run_dir import RunDir, SweepDir, open_run
from distill_cli.jobs.run_panels import relative
from distill_cli.models.model_pair import OWN_TEMPLATE
from distill_cli.terminal.console import Console

BEFORE = "before"
"""The student of a run before training."""


@dataclass(frozen=True)
class Contender:
    """A model that answers."""

    name: str
    """As shown; also its folder inside an evaluation's, with a number if another model has the same."""
    config: Config
    """With the model as `model.<role>`."""
    role: str
    """`student` or `teacher`: whose engine settings apply."""


def config_here(run: RunDir, overrides: Sequence[str], *, unread: Sequence[str]) -> Config:
    """Return a run's config with overrides, for ranks or engines that do not train, on this machine.

    Args:
        unread: dictionaries that are not read.

    Raises:
        ConfigError: an override is refused, or the run's config is damaged.
    """
    config = load_config(run.config)
    names = {field.name for field in fields(ClusterConfig)} - {"launcher"}
    read = [name for name in names if has_property(Config, f"cluster.{name}", "evaluation")]
    cluster = ClusterConfig(**{name: getattr(config.cluster, name) for name in read})
    config = override(config, {"mesh": MeshConfig(), "rollout.replay": None, "cluster": cluster})
    return override(config, overrides, typed=run.typed_overrides(), unread=unread)


def run_around(word: str) -> RunDir | None:
    """Return the run that a folder is, or lies in: runs/latest, runs/latest/student, runs/latest/export/step_40."""
    if not Path(word).is_dir():
        return None
    path = Path(word).resolve()
    runs = map(RunDir, [path, *path.parents][:3])
    return next((run for run in runs if run.command.is_file()), None)


def find(word: str, config: Config, *, step: str | None, console: Console) -> Contender:
    """Return the model that a word of the command line names. Raises ConfigError if there is none."""
    if word == BEFORE:
        return Contender(word, config, "student")
    names = teacher_names(config)
    if word in names:
        return teacher_contender(word, teacher_configs(config)[word])
    if word == ONLY:
        raise ConfigError(f"--against teacher: the run has several; give one of {', '.join(names)}")
    exists = Path(word).exists()
    if not exists and "/" not in word and (near := nearest(word, [BEFORE, *names])):
        raise ConfigError(f"{word}: no such run, folder or model of the run{near}")
    if sweep := SweepDir(Path(word)).elements():
        raise ConfigError(f"{word}: is a sweep; give one of its runs, such as {Path(word, sweep[0].folder)}")
    name, path = Path(word).resolve().name if exists else word.removeprefix("package://"), word
    name = re.sub(r"[^\w.,=+-]+", "_", name).strip("_.")[-80:] or "model"
    if is_run(word):
        path = str(trained_student(open_run(Path(word)), step=step, console=console))
    return Contender(name, override(config, {"model.student.path": path, "model.student.revision": None}), "student")


def is_run(word: str) -> bool:
    """Return whether a word is the folder of a run, not of a model in it."""
    return RunDir(Path(word)).config.is_file() and not Path(word, "config.json").is_file()


def teacher_contender(name: str, config: Config) -> Contender:
    """Return a run's teacher, which is the only one of `config`. It reads prompts in the template that it scores in.

    Raises:
        ConfigError: its files are not known.
    """
    teacher, values = config.model.teacher, dict[str, Any]()
    if not teacher.has_files:
        what = "the student itself; give before" if teacher.is_student else "on a server; give its model's path"
        raise ConfigError(f"--against {name}: it is {what}")
    values["model.student"] = StudentModel(path=str(teacher.path), revision=teacher.revision)
    values["model.chat_template_kwargs"] = {**config.model.chat_template_kwargs, **teacher.chat_template_kwargs}
    if teacher.chat_template is not None or teacher.has_own_tokenizer:
        values["model.chat_template"] = None if teacher.chat_template == OWN_TEMPLATE else teacher.chat_template
    if teacher.has_own_tokenizer:
        values["model.tokenizer"] = None
    return Contender(name, override(config, values), "teacher")


def trained_student(run: RunDir, *, step: str | None, console: Console) -> Path:
    """Return a run's student as a Hugging Face folder: the finished one, or an export of a checkpoint.

    Args:
        step: a step's number, `best` or `last`; None is the finished student, or the newest checkpoint without one.

    Raises:
        ConfigError: there is no such checkpoint.
        DistillError: it could not be exported.
    """
    if step is None and finished_steps(run) >= 0 and (run.student / "config.json").is_file():
        return run.student
    if step is None and not store.find(run.checkpoints):
        raise ConfigError(f"{run.path}: has no trained student and no checkpoint yet; give another run, or a model")
    settings = load_config(run.config).checkpoint
    checkpoint = store.choose(run.checkpoints, step or "last", settings, warn=console.warn)
    folder = run.path / "export" / checkpoint.path.name
    if not folder.exists():
        console.print(f"exporting the student of step {checkpoint.step}: {escape(relative(folder))}")
        command = ["-m", "distill_cli", "export", str(run.path), str(folder), f"--step={checkpoint.step}"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise DistillError(done.stderr.strip().removeprefix("error: ") or f"{folder}: the export failed")
    return folder
