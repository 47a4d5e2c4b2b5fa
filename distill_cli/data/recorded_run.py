"""What a run recorded for a replay: which steps are there, and whether a config can train on them. No torch.

RUN/scores/ holds (`rollout.score_files` writes and reads the tensors):

| file                          | holds                                                                       |
|-------------------------------|-----------------------------------------------------------------------------|
| `recording.json`              | what holds for every step: `Facts`                                          |
| `step_<n>/rank_<r>.safetensors` | the sequences that data rank r trained on, with the teacher's scores      |
| `step_<n>/step.json`          | how many sequences of how many tokens                                       |
| `step_<n>/manifest.json`      | the files' sizes and SHA-256; written last: a step is whole or not there    |
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import RunDir, read_json
from distill_cli.models import model_files

FACTS, STEP = "recording.json", "step.json"


@dataclass(frozen=True)
class Facts:
    """What holds for every recorded step."""

    topk: int
    """Tokens of the teacher's distribution at each position, by falling log-probability."""
    temperature: float
    """What the teacher's logits were divided by."""
    merged_eos_ids: list[int]
    """End tokens that the scores take for one (`model.eos_map`)."""
    end_tokens: list[int]
    """The student's own."""
    vocab_size: int
    """Ids from here on occur nowhere."""
    vocabulary: str | None
    """`vocabulary_digest` of the ids below; None where the tokenizer could not be read."""

    @classmethod
    def of(cls, replay: str) -> Facts:
        """Of the run in this folder. Raises ConfigError where it recorded nothing, or the file is damaged."""
        run, key = recorded_run(replay), f"rollout.replay={replay}"
        if not run.config.is_file():
            raise ConfigError(f"{key}: no run is there (it has no config.yaml); give a run's folder")
        if not (run.scores / FACTS).is_file():
            raise ConfigError(f"{key}: the run kept no scores; record them with rollout.save_scores=true")
        try:
            return cls(**read_json(run.scores / FACTS))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{run.scores / FACTS}: damaged ({error})") from error


@dataclass(frozen=True)
class Recording:
    """A run's `scores/`, with the steps from the first one on that are there."""

    folder: Path
    facts: Facts
    num_steps: int
    longest_response: int
    longest_sequence: int

    @classmethod
    def of(cls, replay: str) -> Recording:
        """What the run in this folder recorded.

        Raises:
            ConfigError: it recorded nothing, or a file is damaged (which one).
        """
        facts, run = Facts.of(replay), recorded_run(replay)
        num_steps, longest_response, longest_sequence = 0, 0, 0
        while (folder := step_folder(run.scores, num_steps + 1)).is_dir():
            problem = atomic_dir.damage(folder, reads=False)
            if problem:
                raise ConfigError(f"{folder}: damaged: {problem}; train.max_steps={num_steps} ends before it")
            step = json.loads((folder / STEP).read_text())
            num_steps += 1
            longest_response = max(longest_response, step["longest_response"])
            longest_sequence = max(longest_sequence, step["longest_sequence"])
        if not num_steps:
            raise ConfigError(
                f"rollout.replay={replay}: no scores of step 1 are there; record them with rollout.save_scores=true"
            )
        return cls(run.scores, facts, num_steps, longest_response, longest_sequence)


def recorded_run(replay: str) -> RunDir:
    return RunDir(Path(replay).expanduser().resolve())


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step}"


def temporary_folder(root: Path, step: int) -> Path:
    """What a step is written under."""
    return root / f".step_{step}.tmp"


def remove_later(root: Path, *, step: int) -> None:
    """Removes what was recorded after `step`, which an attempt that goes on from there records anew."""
    for folder in root.glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            atomic_dir.remove(folder)


def vocabulary_digest(tokenizer: Path, vocab_size: int) -> str | None:
    """Tells a tokenizer's tokens below an id from others; None where they cannot be read."""
    vocabulary = model_files.vocabulary(tokenizer)
    if vocabulary is None:
        return None
    tokens = sorted((number, token) for token, number in vocabulary.items() if number < vocab_size)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
