"""The steps that a run recorded for a replay, and the facts that hold for all its steps. No torch.

RUN/scores/ holds (`rollout.score_files` writes and reads the tensors):

| file                          | holds                                                                       |
|-------------------------------|-----------------------------------------------------------------------------|
| `recording.json`              | what holds for every step: `Facts`                                          |
| `heads/<teacher>_<id>.safetensors` | with hidden states: rows of a teacher's head from this id on, by its index |
| `tokens/<teacher>.safetensors` | what the ids of that head are to the student, if its tokenizer is its own  |
| `step_<n>/rank_<r>.safetensors` | the sequences that data rank r trained on, with the teacher's scores      |
| `step_<n>/step.json`          | how many sequences of how many tokens                                       |
| `step_<n>/manifest.json`      | the files' sizes and SHA-256; written last: a step is complete or absent    |
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from distill_cli.errors import ConfigError
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import RunDir, read_json
from distill_cli.models import model_files
from distill_cli.models.safetensors_header import BITS, read_header
from distill_cli.types import HiddenSize

FACTS, STEP, HEADS, TOKENS = "recording.json", "step.json", "heads", "tokens"


@dataclass(frozen=True)
class Facts:
    """What holds for every recorded step."""

    topk: int
    """Tokens of the teacher's distribution at each position, by falling log-probability."""
    temperature: float
    """Divisor of the teacher's logits."""
    merged_eos_ids: list[int]
    """End-of-sequence tokens that the scores count as one (`model.eos_map`)."""
    end_tokens: list[int]
    """The student's end-of-sequence tokens."""
    vocab_size: int
    """Ids from here on do not occur."""
    vocabulary: str | None
    """`vocabulary_digest` of the ids below; None if the tokenizer could not be read."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """By name, those of teachers whose temperature is not the run's."""

    hidden: bool = False
    """Whether hidden states were recorded instead of a top-k: any support, top-k and temperature follows from them."""

    @classmethod
    def of(cls, replay: str) -> Facts:
        """Read those of the run in this folder. Raises ConfigError if it recorded none, or the file is damaged."""
        run, key = recorded_run(replay), f"rollout.replay={replay}"
        if not run.config.is_file():
            raise ConfigError(f"{key}: no run is there (no config.yaml); give a run's folder")
        if not (run.scores / FACTS).is_file():
            raise ConfigError(f"{key}: the run kept no scores; record them with rollout.save_scores=true")
        try:
            return cls(**read_json(run.scores / FACTS))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{run.scores / FACTS}: damaged ({error})") from error


@dataclass(frozen=True)
class Recording:
    """A run's `scores/`, and its consecutive steps from the first one on."""

    folder: Path
    facts: Facts
    num_steps: int
    longest_response: int
    longest_sequence: int

    @classmethod
    def of(cls, replay: str) -> Recording:
        """Read what the run in this folder recorded. Raises ConfigError if that is nothing, or a file is damaged."""
        facts, root, steps = Facts.of(replay), recorded_run(replay).scores, list[dict[str, int]]()
        while (folder := step_folder(root, len(steps) + 1)).is_dir():
            if problem := atomic_dir.damage(folder, reads=False):
                raise ConfigError(f"{folder}: damaged: {problem}; train.max_steps={len(steps)} ends before it")
            steps.append(read_json(folder / STEP))
        if not steps:
            raise ConfigError(f"rollout.replay={replay}: step 1 has no scores; set rollout.save_scores=true to record")
        longest = (max(step[f"longest_{part}"] for step in steps) for part in ("response", "sequence"))
        return cls(root, facts, len(steps), *longest)

    def hidden_states(self) -> list[HiddenSize]:
        """Return the sizes of the hidden states of each teacher; none if a top-k was recorded."""
        heads = {file.stem.partition("_")[0]: file for file in sorted((self.folder / HEADS).glob("*.safetensors"))}
        found = []
        for index, file in sorted(heads.items()):
            kind, (_, width) = read_header(file)["weight"]
            own = self.folder / TOKENS / f"{index}.safetensors"
            own_ids = read_header(own)["firsts"][1][0] if own.exists() else None
            found.append(HiddenSize(width, BITS[kind] // 8, own_ids))
        return found


def recorded_run(replay: str) -> RunDir:
    """Return the run in the folder that `rollout.replay` names."""
    return RunDir(Path(replay).expanduser().resolve())


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a complete step."""
    return root / f"step_{step}"


def temporary_folder(root: Path, step: int) -> Path:
    """Return the folder in which a step is written before it is complete."""
    return root / f".step_{step}.tmp"


def remove_later(root: Path, *, step: int) -> None:
    """Remove what was recorded after `step`: an attempt that resumes there records it again."""
    for folder in root.glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            atomic_dir.remove(folder)


def vocabulary_digest(tokenizer: Path, vocab_size: int) -> str | None:
    """Hash a tokenizer's tokens with ids below `vocab_size`; None if it has no vocabulary that can be read."""
    if (vocabulary := model_files.vocabulary(tokenizer)) is None:
        return None
    tokens = sorted((number, token) for token, number in vocabulary.items() if number < vocab_size)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
