"""What a run has sampled and not trained on: part of its state, saved with each checkpoint.

It is the same on all ranks. Prompts are not saved: each is found again by its place in the order of the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill_cli.types import Prompt, Rollout, Sample

LISTS = {"token_ids": torch.int32, "logp": torch.float32, "trained": torch.bool}
"""Fields of a sample that hold a value of each token."""


@dataclass(frozen=True)
class SampledStep:
    """The sequences of a step, not scored yet."""

    rollouts: tuple[Rollout, ...]
    origins: tuple[tuple[int, int], ...]
    """The batch of `PromptOrder` that each rollout's prompt is in, and the prompt's index there."""
    slots: tuple[int, ...] | None = None
    """`ScoredBatch.slots`."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfinished:
    """A sequence that goes on in a later step: with the prompt and the seed all that its next token depends on."""

    sample: Sample
    """What is written of the answer."""
    turn_start: int
    """Index in the answer of the first token of the turn that is being written."""
    num_requests: int
    began: int
    """The step in which it began."""


@dataclass(frozen=True)
class Slot:
    """What a slot goes on with (`rollout.carry_over`)."""

    number: int = 0
    """Index of the batch whose prompt it answers, or would answer next."""
    unfinished: Unfinished | None = None
    """None if nothing is written of that answer."""

    @property
    def written(self) -> Sample | None:
        """What is written of the answer."""
        return None if self.unfinished is None else self.unfinished.sample


@dataclass(frozen=True)
class InFlight:
    """What is in flight after a step."""

    sampled_step: int = 0
    """The last step that was sampled."""
    waiting: tuple[SampledStep, ...] = ()
    """The steps that were sampled and not trained on, in their order."""
    slots: tuple[Slot, ...] = ()
    """Empty before the first step, and without carry-over."""

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.slots

    def save(self, file: Path) -> None:
        """Write it as one safetensors file."""
        samples = list[Sample]()

        def keep(sample: Sample | None) -> int | None:
            if sample is None:
                return None
            samples.append(sample)
            return len(samples) - 1

        facts: dict[str, Any] = {
            "sampled_step": self.sampled_step,
            "waiting": [
                {
                    "origins": step.origins,
                    "slots": step.slots,
                    "metrics": dict(step.metrics),
                    "samples": [keep(rollout.sample) for rollout in step.rollouts],
                    "carried": [keep(rollout.carried) for rollout in step.rollouts],
                    "rewards": [rollout.reward for rollout in step.rollouts],
                }
                for step in self.waiting
            ],
            "slots": [
                {
                    "number": slot.number,
                    "unfinished": slot.unfinished and {**vars(slot.unfinished), "sample": keep(slot.unfinished.sample)},
                }
                for slot in self.slots
            ],
        }
        facts["samples"] = [_facts(sample) for sample in samples]
        tensors = {}
        for name, dtype in LISTS.items():
            flat = [value for sample in samples for value in getattr(sample, name) or [0] * len(sample.token_ids)]
            tensors[name] = torch.tensor(flat, dtype=dtype)
        save_file(tensors, file, metadata={"facts": json.dumps(facts)})

    @classmethod
    def load(cls, file: Path, prompts: Callable[[int], Sequence[Prompt]]) -> InFlight:
        """Read what `save` wrote.

        Args:
            prompts: returns a batch of `PromptOrder` by its index, counted from 0; called with rising indices.
        """
        with safe_open(file, framework="pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            lists = {name: iter(stored.get_tensor(name).tolist()) for name in LISTS}
        samples = [_sample(one, lists) for one in facts["samples"]]
        needed = {batch for step in facts["waiting"] for batch, _ in step["origins"]}
        needed |= {slot["number"] for slot in facts["slots"]}
        batches = {number: prompts(number) for number in sorted(needed)}
        waiting = []
        for step in facts["waiting"]:
            columns = (step[name] for name in ("origins", "samples", "rewards", "carried"))
            rollouts = [
                Rollout(batches[batch][index], samples[sample], reward, None if carried is None else samples[carried])
                for (batch, index), sample, reward, carried in zip(*columns, strict=True)
            ]
            origins, own = tuple(map(tuple, step["origins"])), step["slots"] and tuple(step["slots"])
            waiting.append(SampledStep(tuple(rollouts), origins, own, step["metrics"]))
        slots = [
            Slot(one["number"], rest and Unfinished(**{**rest, "sample": samples[rest["sample"]]}))
            for one in facts["slots"]
            for rest in (one["unfinished"],)
        ]
        return cls(facts["sampled_step"], tuple(waiting), tuple(slots))


def _facts(sample: Sample) -> dict[str, Any]:
    """Return a sample without its lists."""
    names = ("finish_reason", "num_turns", "source")
    lists = {f"has_{name}": getattr(sample, name) is not None for name in LISTS}
    return {"length": len(sample.token_ids), **lists, **{name: getattr(sample, name) for name in names}}


def _sample(facts: Mapping[str, Any], lists: Mapping[str, Iterator[Any]]) -> Sample:
    """Return a sample of these facts, with the next values of the lists."""
    values = {name: [next(values) for _ in range(facts["length"])] for name, values in lists.items()}
    kept: dict[str, Any] = {name: value if facts[f"has_{name}"] else None for name, value in values.items()}
    return Sample(**kept, **{name: facts[name] for name in ("finish_reason", "num_turns", "source")})
