"""What another run recorded, with the teacher's scores, in place of new sequences: no engine is needed."""

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
    """Reads recorded steps; after the last one comes the first again."""

    def __init__(self, recording: Recording, *, topk: int, parallel: Parallel) -> None:
        """`topk` is that of the loss: the first of the recorded ones, which are sorted."""
        self._recording, self._topk, self._parallel = recording, topk, parallel
        self.steps_per_epoch = recording.num_steps
        self.fingerprint = atomic_dir.sha256(step_folder(recording.folder, 1) / atomic_dir.MANIFEST)
        """Tells one recording from another."""

    def rollouts(self, step: int) -> list[Rollout]:
        """Read the sequences of `step`, counted from 1, from the files of all ranks. A collective."""
        folder = self._folder(step)
        self._check(folder)
        files = [read_sequences(file) for file in sorted(folder.glob("*.safetensors"))]
        by_place = {place: rollout for file in files for place, rollout in file.items()}
        return [by_place[place] for place in range(len(by_place))]

    def scores(self, step: int, places: Sequence[int]) -> dict[int, TeacherScores]:
        """Read the teacher's scores of the sequences at these places, in their order."""
        found: dict[int, TeacherScores] = {}
        for file in sorted(self._folder(step).glob("*.safetensors")):
            found |= read_scores(file, set(places), topk=self._topk)
        return {place: found[place] for place in places}

    def _folder(self, step: int) -> Path:
        return step_folder(self._recording.folder, (step - 1) % self._recording.num_steps + 1)

    def _check(self, folder: Path) -> None:
        """Raise ConfigError on all ranks if a file is not as it was written; the main rank looks. A collective."""
        found = [atomic_dir.damage(folder) if self._parallel.is_main else None]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            raise ConfigError(f"{folder}: damaged: {found[0]}; put it back, or end before it with train.max_steps")


@dataclass
class Replay(RolloutSource):
    """Trains on recorded steps, each rank reading its own part of the scores."""

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
