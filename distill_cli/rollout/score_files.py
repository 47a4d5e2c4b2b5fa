"""Each step's sequences with the teacher's scores, kept on disk (`rollout.save_scores`) and read again (a replay).

`data.recording` says which files there are. Each data rank writes what it trains on. The ranks of a replay, however
many, read the tokens of every file, from which they plan the step, and the scores of what they train on themselves.

Shape letters: S sequences of a file, R response tokens of all of them, K the teacher's top-k.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distill_cli.data.recorded_run import FACTS, STEP, Facts, Recording, step_folder, temporary_folder
from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import write_json
from distill_cli.parallel.mesh import Parallel
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores

log = logging.getLogger(__name__)


class Recorder:
    """Keeps steps. Every rank has one and calls it at the same steps: a collective."""

    def __init__(self, root: Path, facts: Facts, parallel: Parallel) -> None:
        self._root, self._parallel = root, parallel
        if parallel.is_main:
            root.mkdir(exist_ok=True)
            write_json(root / FACTS, asdict(facts))

    def keep(self, step: int, rollouts: Sequence[Rollout], places: Sequence[int]) -> None:
        """Writes a step; one that cannot be written (a full disk) is a warning, and a replay ends before it.

        Args:
            rollouts: all of the step, in its order.
            places: those that this rank trains on, which have scores; ranks that share sequences name the same.
        """
        temporary = temporary_folder(self._root, step)
        writes = self._parallel.context.get_local_rank() == self._parallel.tensor.get_local_rank() == 0
        mine: dict[str, Any] | OSError = {}
        try:
            if writes and places:
                mine = self._write(temporary, rollouts, places)
        except OSError as error:
            mine = error
        everyone: list[dict[str, Any] | OSError] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if self._parallel.is_main:
            self._seal(step, temporary, rollouts, everyone)

    def _write(self, temporary: Path, rollouts: Sequence[Rollout], places: Sequence[int]) -> dict[str, Any]:
        temporary.mkdir(parents=True, exist_ok=True)
        file = temporary / f"rank_{self._parallel.data_rank}.safetensors"
        write_sequences(file, [rollouts[place] for place in places], places)
        return atomic_dir.describe([file])

    def _seal(self, step: int, temporary: Path, rollouts: Sequence[Rollout], everyone: Sequence[Any]) -> None:
        failed = [error for error in everyone if isinstance(error, OSError)]
        try:
            if failed:
                raise failed[0]
            lengths = {
                "num_sequences": len(rollouts),
                "num_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
                "longest_response": max(len(rollout.sample.token_ids) for rollout in rollouts),
                "longest_sequence": max(len(rollout.token_ids) for rollout in rollouts),
            }
            write_json(temporary / STEP, lengths)
            entries = {name: entry for part in everyone for name, entry in part.items()}
            atomic_dir.seal(temporary, step_folder(self._root, step), entries | atomic_dir.describe([temporary / STEP]))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            log.warning("the scores of step %d could not be kept (%s): a replay ends before it", step, error.strerror)


class Replay:
    """Recorded steps in the place of prompts: an order that knows what was answered. Every rank reads its own part."""

    def __init__(self, recording: Recording, *, topk: int, parallel: Parallel) -> None:
        """`topk` is that of the loss: the first of the recorded ones, which are sorted."""
        self._recording, self._topk, self._parallel = recording, topk, parallel
        self.steps_per_epoch = recording.num_steps
        self.fingerprint = atomic_dir.sha256(step_folder(recording.folder, 1) / atomic_dir.MANIFEST)
        """Tells one recording from another."""

    def rollouts(self, step: int) -> list[Rollout]:
        """The sequences of step `step`, counted from 0, without scores; after the last one comes the first again."""
        folder = self._folder(step)
        self._check(folder)
        files = [read_sequences(file) for file in sorted(folder.glob("*.safetensors"))]
        by_place = {place: rollout for file in files for place, rollout in file.items()}
        return [by_place[place] for place in range(len(by_place))]

    def fill_in(self, step: int, rollouts: Sequence[Rollout], places: Sequence[int]) -> None:
        """The teacher's scores of the sequences at these places."""
        for file in sorted(self._folder(step).glob("*.safetensors")):
            for place, scores in read_scores(file, set(places), topk=self._topk).items():
                rollouts[place].scores = scores

    def _folder(self, step: int) -> Path:
        return step_folder(self._recording.folder, step % self._recording.num_steps + 1)

    def _check(self, folder: Path) -> None:
        """Raises ConfigError on all ranks where a file is not as it was written. A collective: the main rank looks."""
        found = [atomic_dir.damage(folder) if self._parallel.is_main else None]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            raise ConfigError(f"{folder}: damaged: {found[0]}; put it back, or end before it with train.max_steps")


def write_sequences(file: Path, rollouts: Sequence[Rollout], places: Sequence[int]) -> None:
    """Scored sequences and their places in the step, as one safetensors file."""
    samples, scores = [rollout.sample for rollout in rollouts], [rollout.scores for rollout in rollouts]
    masks = [sample.trained or [True] * len(sample.token_ids) for sample in samples]
    tensors = {
        "places": torch.tensor(places),
        "prompt_lengths": torch.tensor([len(rollout.prompt.token_ids) for rollout in rollouts]),
        "response_lengths": torch.tensor([len(sample.token_ids) for sample in samples]),
        "token_ids": torch.tensor([token for rollout in rollouts for token in rollout.token_ids], dtype=torch.int32),
        "trained": torch.tensor([flag for mask in masks for flag in mask], dtype=torch.bool),
        "sampler_logp": torch.tensor([logp for sample in samples for logp in sample.logp]),
        "topk_ids": torch.cat([score.topk_ids for score in scores]).contiguous(),
        "topk_logp": torch.cat([score.topk_logp for score in scores]).contiguous(),
        "teacher_logp": torch.cat([score.sampled_logp for score in scores]).contiguous(),
    }
    facts = [
        {
            "prompt_index": rollout.prompt.index,
            "finish_reason": rollout.sample.finish_reason,
            "has_observations": rollout.sample.trained is not None,
            "num_turns": rollout.sample.num_turns,
            "source": rollout.sample.source,
            "reward": rollout.reward,
        }
        for rollout in rollouts
    ]
    save_file(tensors, file, metadata={"sequences": json.dumps(facts)})


def read_sequences(file: Path) -> dict[int, Rollout]:
    """Place in the step -> sequence, without its scores. Raises ConfigError where the file cannot be read."""
    names = ("places", "prompt_lengths", "response_lengths", "token_ids", "trained", "sampler_logp")
    try:
        with safe_open(file, framework="pt") as stored:
            facts = json.loads(stored.metadata()["sequences"])
            places, prompts, responses, token_ids, trained, logp = (stored.get_tensor(name).tolist() for name in names)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}: {error})") from error
    found, token, response = {}, 0, 0
    for place, num_prompt, num_response, fact in zip(places, prompts, responses, facts, strict=True):
        prompt = Prompt(fact["prompt_index"], token_ids[token : token + num_prompt], Example(""))
        of_response = slice(response, response + num_response)
        sample = Sample(
            token_ids[token + num_prompt : token + num_prompt + num_response],
            logp[of_response],
            fact["finish_reason"],
            trained=trained[of_response] if fact["has_observations"] else None,
            num_turns=fact["num_turns"],
            source=fact["source"],
        )
        found[place] = Rollout(prompt, sample, reward=fact["reward"])
        token, response = token + num_prompt + num_response, response + num_response
    return found


def read_scores(file: Path, places: set[int], *, topk: int) -> dict[int, TeacherScores]:
    """Place in the step -> scores, of those of `places` that the file holds: the first `topk` of each position."""
    with safe_open(file, framework="pt") as stored:
        lengths = stored.get_tensor("response_lengths").tolist()
        ends = list(accumulate(lengths))
        found = {}
        ids_RK, logp_RK, sampled_R = (stored.get_slice(name) for name in ("topk_ids", "topk_logp", "teacher_logp"))
        for place, end, length in zip(stored.get_tensor("places").tolist(), ends, lengths, strict=True):
            if place in places:
                rows = slice(end - length, end)
                found[place] = TeacherScores(ids_RK[rows, :topk], logp_RK[rows, :topk], sampled_R[rows])
    return found
