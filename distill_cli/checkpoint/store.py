"""Checkpoints on disk: complete or absent, checked before use, kept by number and by metric. No torch.

A checkpoint is a folder `checkpoints/step_<n>/`:

| file                  | holds                                                                               |
|-----------------------|-------------------------------------------------------------------------------------|
| `shard-*.safetensors` | parameters under their Hugging Face names, and AdamW's moments, as the ranks cut them |
| `rank_<r>.json`       | rank r's random states                                                              |
| `state.json`          | the step, its metrics, and whatever else a run resumes from                          |
| `config.yaml`         | the run's config at that step                                                       |
| `manifest.json`       | size and SHA-256 of every other file; written last                                   |

It is written under a hidden name, made durable, and renamed. Reading it executes nothing.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_cli.config.execution_schema import CheckpointConfig
from distill_cli.errors import ConfigError
from distill_cli.folders.atomic_dir import MANIFEST, damage, remove
from distill_cli.folders.run_dir import read_json
from distill_cli.models.model_files import ModelFiles, fingerprint

STATE = "state.json"
CONFIG = "config.yaml"
IN_FLIGHT = "in_flight.samples"
"""Safetensors inside; with that suffix it would be read as a part of the student."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was completed; `damage` tells whether it is still whole."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_"))

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of `state.json`."""
        return read_json(self.path / STATE)

    @property
    def recorded_step(self) -> int:
        """The last step of metrics.jsonl that belongs to it: `step`, or one less if its validation is still due."""
        return self.state["step"]

    def metric(self, name: str) -> float | None:
        """Return the step's value of `train/...` or `val/...`; None if it had none, or it was not finite."""
        return self.state["metrics"].get(name)


def find(root: Path) -> list[Checkpoint]:
    """Return the completed checkpoints in a run's `checkpoints/`, oldest first."""
    paths = [manifest.parent for manifest in root.glob(f"step_*/{MANIFEST}")]
    found = [Checkpoint(path) for path in paths if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_whole(root: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, None if there is none; pass a line on each damaged one to `warn`."""
    for checkpoint in reversed(find(root)):
        if (problem := damage(checkpoint.path)) is None:
            return checkpoint
        warn(f"{checkpoint.path}: damaged and ignored: {problem}")
    return None


def best(checkpoints: Sequence[Checkpoint], settings: CheckpointConfig) -> list[Checkpoint]:
    """Return the checkpoints that have a value for `metric`, best first; of equal ones the newer first."""
    sign = 1 if settings.keeps_highest else -1
    ranked = [(sign * value, c.step, c) for c in checkpoints if (value := c.metric(settings.metric)) is not None]
    return [checkpoint for *_, checkpoint in sorted(ranked, key=lambda item: item[:2], reverse=True)]


def prune(root: Path, settings: CheckpointConfig) -> None:
    """Remove all but the newest and the best `keep_top_k` checkpoints.

    If fewer than `keep_top_k` have a value for the metric, keep the newest ones of the rest too.
    """
    found = find(root)
    ranked = best(found, settings)
    kept = [*ranked, *(checkpoint for checkpoint in reversed(found) if checkpoint not in ranked)][: settings.keep_top_k]
    for checkpoint in found[:-1]:
        if checkpoint not in kept:
            remove(checkpoint.path)


def remove_unfinished(root: Path) -> None:
    """Remove what an attempt was writing or removing when it died."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return root / f"step_{step}"


def choose(root: Path, which: str, settings: CheckpointConfig, *, warn: Callable[[str], None]) -> Checkpoint:
    """Return the checkpoint that `which` names: a step's number, `best` by the metric, or `last`, the newest whole one.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    found = find(root)
    if which == "last" and (newest := newest_whole(root, warn=warn)) is not None:
        return newest
    of_step = [checkpoint for checkpoint in found if str(checkpoint.step) == which]
    candidates = {"last": found[-1:], "best": best(found, settings)[:1]}.get(which, of_step)
    if not candidates:
        steps = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
        unranked = f"; none has a value for {settings.metric}" if which == "best" and found else ""
        raise ConfigError(f"{root}: no checkpoint {which} (there are steps: {steps}{unranked})")
    if problem := damage(candidates[0].path):
        raise ConfigError(f"{candidates[0].path}: damaged: {problem}; choose another with --step")
    return candidates[0]


def check_base(checkpoint: Checkpoint, student: ModelFiles) -> None:
    """Raise ConfigError if the frozen weights that a checkpoint's adapters belong to have changed since."""
    expected = checkpoint.state.get("base")
    if expected is not None and fingerprint(student.folder) != expected:
        what = f"its weights are not those that the adapters of {checkpoint.path} were trained on"
        raise ConfigError(f"model.student.path={student.path}: {what}; put them back in {student.folder}")
