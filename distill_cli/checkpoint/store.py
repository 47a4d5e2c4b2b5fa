"""Checkpoints on disk: whole or not there, checked before use, kept by number and by metric. No torch here.

A checkpoint is a folder `checkpoints/step_<n>/`:

| file                  | holds                                                                               |
|-----------------------|-------------------------------------------------------------------------------------|
| `shard-*.safetensors` | parameters under their Hugging Face names, and AdamW's moments, as the ranks cut them |
| `rank_<r>.json`       | rank r's random states                                                              |
| `state.json`          | the step, its metrics, and whatever else a run goes on from                          |
| `config.yaml`         | the config that it was made under                                                   |
| `manifest.json`       | every other file's size and SHA-256; written last                                    |

It is written under a hidden name, made durable, and renamed. Nothing in it is executed on reading.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError
from distill_cli.folders.atomic_dir import MANIFEST, damage, remove

STATE = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was finished; whether it is still whole is for `damage` to say."""

    path: Path
    step: int

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        return cls(path, int(path.name.removeprefix("step_")))

    @cached_property
    def state(self) -> dict[str, Any]:
        """What `state.json` holds."""
        return json.loads((self.path / STATE).read_text())

    @property
    def recorded_step(self) -> int:
        """The last step of metrics.jsonl that belongs to it: one less than `step` where a validation is to follow."""
        return self.state["step"]

    def metric(self, name: str) -> float | None:
        """The step's value of `train/...` or `val/...`; None where it had none, or it was not finite."""
        return self.state["metrics"].get(name)


def find(root: Path) -> list[Checkpoint]:
    """The finished checkpoints in a run's `checkpoints/`, oldest first."""
    found = []
    for path in root.glob("step_*"):
        if path.name.removeprefix("step_").isdigit() and (path / MANIFEST).is_file():
            found.append(Checkpoint.at(path))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_whole(root: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; each damaged one is named to `warn`. None where there is none."""
    for checkpoint in reversed(find(root)):
        problem = damage(checkpoint.path)
        if problem is None:
            return checkpoint
        warn(f"{checkpoint.path}: damaged and left out: {problem}")
    return None


def best(checkpoints: Sequence[Checkpoint], *, metric: str, higher_is_better: bool) -> list[Checkpoint]:
    """Those that have a value for `metric`, best first; of equals the newer one."""
    ranked = [(checkpoint.metric(metric), checkpoint) for checkpoint in checkpoints]
    ranked = [(value if higher_is_better else -value, c.step, c) for value, c in ranked if value is not None]
    return [checkpoint for *_, checkpoint in sorted(ranked, key=lambda item: item[:2], reverse=True)]


def prune(root: Path, *, keep_top_k: int, metric: str, higher_is_better: bool) -> list[Path]:
    """Removes all but the newest and the best `keep_top_k`; the removed folders.

    While fewer than `keep_top_k` have a value for the metric, the newest ones fill up the number.
    """
    found = find(root)
    kept = best(found, metric=metric, higher_is_better=higher_is_better)[:keep_top_k]
    without = [checkpoint for checkpoint in reversed(found) if checkpoint not in kept]
    kept += without[: keep_top_k - len(kept)]
    removed = [checkpoint.path for checkpoint in found[:-1] if checkpoint not in kept]
    for path in removed:
        remove(path)
    return removed


def remove_unfinished(root: Path) -> None:
    """Removes what an attempt that died was writing or removing."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def temporary_path(root: Path, step: int) -> Path:
    return root / f".step_{step}.tmp"


def final_path(root: Path, step: int) -> Path:
    return root / f"step_{step}"


def choose(root: Path, which: str, *, metric: str, higher_is_better: bool, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that `which` names: a step's number, `best` by the metric, or `last`, which is a whole one.

    Raises:
        DistillError: there is none, with those that there are; or it is damaged.
    """
    found = find(root)
    newest = newest_whole(root, warn=warn) if which == "last" else None
    if newest is not None:
        return newest
    by_metric = best(found, metric=metric, higher_is_better=higher_is_better)
    candidates = {"last": found[-1:], "best": by_metric[:1]}.get(which, [c for c in found if str(c.step) == which])
    if not candidates:
        steps = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
        unranked = f"; none has a value for {metric}" if which == "best" and found else ""
        raise DistillError(f"{root}: no checkpoint {which} (there are steps: {steps}{unranked})")
    problem = damage(candidates[0].path)
    if problem:
        raise DistillError(f"{candidates[0].path}: damaged: {problem}; choose another with --step")
    return candidates[0]
