"""A run that is on disk: its folder, its checkpoints, the weights that it began from."""

import shlex
from pathlib import Path

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.models.model_files import ModelFiles, fingerprint
from distill_cli.terminal.console import Console


def open_run(path: Path) -> RunDir:
    """Return the run in a folder. Raises ConfigError if there is none."""
    run = RunDir(path.resolve())
    if not run.config.is_file():
        what = "no run is there (it has no config.yaml)" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {what}; give a run's folder, such as runs/latest")
    return run


def finished_steps(run: RunDir) -> int:
    """Return how many steps a finished run has made; -1 if it has not finished."""
    outcome = read_outcome(run)
    return outcome.num_steps if outcome and outcome.is_finished else -1


def choose_checkpoint(run: RunDir, which: str, config: Config, *, console: Console) -> Checkpoint:
    """Return the checkpoint of a step, `best` or `last`. Raises ConfigError if it is missing or damaged."""
    try:
        return store.choose(run.checkpoints, which, config.checkpoint, warn=console.warn)
    except DistillError as error:
        raise ConfigError(str(error)) from error


def check_base(checkpoint: Checkpoint, student: ModelFiles) -> None:
    """Raise ConfigError if the frozen weights that a checkpoint's adapters belong to have changed since."""
    expected = checkpoint.state.get("base")
    if expected is not None and fingerprint(student.folder) != expected:
        what = f"its weights are not those that the adapters of {checkpoint.path} were trained on"
        raise ConfigError(f"model.student.path={student.path}: {what}; put them back in {student.folder}")


def typed_overrides(run: RunDir) -> list[str]:
    """Return the overrides of the command that made a run; of a sweep's command with the values of this run."""
    words = shlex.split(run.command.read_text()) if run.command.is_file() else []
    keys = [(word.partition("=")[0], word) for word in words if "=" in word]
    typed = {key.lstrip("+"): word for key, word in keys if "/" not in key and key[:1] != "-"}  # no path, no flag
    elements = [one for one in SweepDir(run.path.parent).elements() if one.folder == run.path.name]
    swept = [word for element in elements for word in element.overrides]
    return list((typed | {word.lstrip("+").partition("=")[0]: word for word in swept}).values())
