"""Recorded steps of another run, with the teacher's scores, in place of new sequences: no engine is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from distill_cli.data.recorded_run import Recording, step_folder
from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import Planner
from distill_cli.rollout.score_files import read_scores, read_sequences
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.types import Rollout, TeacherScores


class RecordedSteps:
    """Read recorded steps; the first step follows the last one."""

    def __init__(self, recording: Recording, *, topk: int, parallel: Parallel) -> None:
        """`topk` is the loss's: only the likeliest of the recorded tokens are read."""
        self._recording, self._topk, self._parallel = recording, topk, parallel
        self.steps_per_epoch = recording.num_steps
        self.fingerprint = atomic_dir.sha256(step_folder(recording.folder, 1) / atomic_dir.MANIFEST)
        """Identifies the recording."""

    def rollouts(self, step: int) -> list[Rollout]:
        """Read the sequences of `step`, counted from 1, from the files of all ranks. A collective.

        Raises:
            ConfigError: on all ranks, if a file is damaged.
        """
        folder = self._folder(step)
        problem = [atomic_dir.damage(folder) if self._parallel.is_main else None]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise ConfigError(f"{folder}: damaged: {problem[0]}; restore it, or end before it with train.max_steps")
        by_place = {place: rollout for file in _files(folder) for place, rollout in read_sequences(file).items()}
        return [by_place[place] for place in range(len(by_place))]

    def scores(self, step: int, places: Sequence[int]) -> dict[int, TeacherScores]:
        """Read the teacher's scores of the sequences at these places, in their order."""
        by_place: dict[int, TeacherScores] = {}
        for file in _files(self._folder(step)):
            by_place |= read_scores(file, set(places), topk=self._topk)
        return {place: by_place[place] for place in places}

    def _folder(self, step: int) -> Path:
        return step_folder(self._recording.folder, (step - 1) % self._recording.num_steps + 1)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@dataclass
class Replay(RolloutSource):
    """Train on recorded steps; each rank reads the scores of its own sequences."""

    recorded: RecordedSteps
    planner: Planner
    stages: Stages

    def step(self, step: int) -> ScoredBatch:
        self.stages.check_stop(within_s=self.stages.longest_s)
        with self.stages("read"):
            rollouts = self.recorded.rollouts(step)
            plans = self.planner.plan(rollouts)
            scores = self.recorded.scores(step, self.planner.local_places(plans))
        return ScoredBatch(rollouts, plans, scores, is_current=False)
