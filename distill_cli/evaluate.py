"""Validation: answers to held-out prompts, checked exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distill_cli.data.registry import Verifier
from distill_cli.engines.settings import SamplingSettings
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.sharing import EngineShare, share_out
from distill_cli.rollout.collect import judge_rollouts, sample_rollouts, sequence_seed
from distill_cli.types import Prompt


@dataclass(frozen=True)
class Score:
    """Over all validation prompts of all ranks."""

    accuracy: float
    mean_length: float
    """Tokens of an answer."""
    truncated_rate: float
    """Share of answers that reached their length limit."""
    num_samples: int

    def metrics(self) -> dict[str, float]:
        return {
            "val/accuracy": self.accuracy,
            "val/mean_length": self.mean_length,
            "val/truncated_rate": self.truncated_rate,
        }


@dataclass(frozen=True)
class Validator:
    """The validation prompts, and how they are answered and judged."""

    prompts: Sequence[Prompt]
    sampling: SamplingSettings
    verify: Verifier
    decode: Callable[[list[int]], str]
    batch_size: int
    seed: int
    parallel: Parallel

    def run(self, engine) -> Score:
        """The score of whoever `engine.sample` speaks for. A collective: each engine answers its share."""
        totals = torch.zeros(4, dtype=torch.float64, device=self.parallel.device)
        engines = EngineShare.of_all_ranks(engine.tensor_parallel, self.parallel)
        mine = share_out([len(prompt.token_ids) for prompt in self.prompts], engines.num_engines)[engines.index]
        for begin in range(0, len(mine), self.batch_size):
            indices = mine[begin : begin + self.batch_size]
            rollouts = sample_rollouts(
                [self.prompts[i] for i in indices],
                # Seeds of their own, the same at every validation: what differs is the model.
                seeds=[sequence_seed(self.seed, step=0, sequence=i) for i in indices],
                sampler=engine,
                sampling=self.sampling,
            )
            judge_rollouts(rollouts, verify=self.verify, decode=self.decode)
            for rollout in rollouts:
                truncated = float(rollout.sample.finish_reason == "length")
                totals += torch.tensor([rollout.reward or 0.0, len(rollout.sample.token_ids), truncated, 1.0]).to(
                    totals
                )
        if not engines.is_first:
            totals.zero_()
        right, length, truncated, number = self.parallel.sum_of_ranks(totals).tolist()
        return Score(right / number, length / number, truncated / number, int(number))
