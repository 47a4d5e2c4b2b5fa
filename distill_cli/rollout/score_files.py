"""Each step's sequences with the teacher's scores on disk: `rollout.save_scores` writes them, a replay reads them.

`data.recorded_run` says which files there are. Each data rank writes what it trains on. The ranks of a replay, however
many, read the tokens of every file, from which they plan the step, and the scores of what they train on themselves.

Shape letters: S sequences of a file, R response tokens of all of them, K the teacher's top-k.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distill_cli.data.recorded_run import FACTS, STEP, Facts, step_folder, temporary_folder
from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import write_json
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.source import ScoredBatch
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores

log = logging.getLogger(__name__)


class Recorder:
    """Writes steps. Every rank has one and calls it at the same steps: a collective."""

    def __init__(self, root: Path, facts: Facts, parallel: Parallel) -> None:
        self._root, self._parallel = root, parallel
        if parallel.is_main:
            root.mkdir(exist_ok=True)
            write_json(root / FACTS, asdict(facts))

    def write(self, step: int, batch: ScoredBatch) -> None:
        """Write a step; one that cannot be written (a full disk) is a warning, and a replay ends before it."""
        temporary = temporary_folder(self._root, step)
        writes = self._parallel.context.get_local_rank() == self._parallel.tensor.get_local_rank() == 0
        mine: dict[str, Any] | OSError = {}
        try:
            if writes and batch.scores:  # ranks that share sequences have the same
                mine = self._write_part(temporary, batch)
        except OSError as error:
            mine = error
        everyone: list[dict[str, Any] | OSError] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if self._parallel.is_main:
            self._seal(step, temporary, batch.rollouts, everyone)

    def _write_part(self, temporary: Path, batch: ScoredBatch) -> dict[str, Any]:
        temporary.mkdir(parents=True, exist_ok=True)
        file = temporary / f"rank_{self._parallel.data_rank}.safetensors"
        write_sequences(file, batch.rollouts, batch.scores)
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


def write_sequences(file: Path, rollouts: Sequence[Rollout], scores: Mapping[int, TeacherScores]) -> None:
    """Write those of a step's sequences that have scores, with these, as one safetensors file."""
    rollouts, whole = [rollouts[place] for place in scores], TeacherScores.cat(list(scores.values()))
    samples = [rollout.sample for rollout in rollouts]
    logps = [[0.0] * len(sample.token_ids) if sample.logp is None else sample.logp for sample in samples]
    masks = [sample.trained or [True] * len(sample.token_ids) for sample in samples]
    tensors = {
        "places": torch.tensor(list(scores)),
        "prompt_lengths": torch.tensor([len(rollout.prompt.token_ids) for rollout in rollouts]),
        "response_lengths": torch.tensor([len(sample.token_ids) for sample in samples]),
        "token_ids": torch.tensor([token for rollout in rollouts for token in rollout.token_ids], dtype=torch.int32),
        "trained": torch.tensor([flag for mask in masks for flag in mask], dtype=torch.bool),
        "sampler_logp": torch.tensor([value for logp in logps for value in logp]),
        "topk_ids": whole.topk_ids.contiguous(),
        "topk_logp": whole.topk_logp.contiguous(),
        "teacher_logp": whole.sampled_logp.contiguous(),
    }
    facts = [
        {
            "prompt_index": rollout.prompt.index,
            "finish_reason": rollout.sample.finish_reason,
            "has_logp": rollout.sample.logp is not None,
            "has_observations": rollout.sample.trained is not None,
            "num_turns": rollout.sample.num_turns,
            "source": rollout.sample.source,
            "reward": rollout.reward,
        }
        for rollout in rollouts
    ]
    save_file(tensors, file, metadata={"sequences": json.dumps(facts)})


def read_sequences(file: Path) -> dict[int, Rollout]:
    """Return place in the step -> sequence. Raises ConfigError if the file cannot be read."""
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
            logp[of_response] if fact["has_logp"] else None,
            fact["finish_reason"],
            trained=trained[of_response] if fact["has_observations"] else None,
            num_turns=fact["num_turns"],
            source=fact["source"],
        )
        found[place] = Rollout(prompt, sample, reward=fact["reward"])
        token, response = token + num_prompt + num_response, response + num_response
    return found


def read_scores(file: Path, places: set[int], *, topk: int) -> dict[int, TeacherScores]:
    """Return place in the step -> scores, of those of `places` that the file holds: `topk` tokens of each position."""
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
