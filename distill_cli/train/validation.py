"""Answers to a benchmark's problems, several to each if asked for, and judged: validation and `eval`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.engines.base import AnsweringEngine, Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.sharing import EngineShare, partition_by_cost
from distill_cli.rollout.collect import judge_rollouts, sample_rollouts, sequence_seed
from distill_cli.rollout.turns import Turns
from distill_cli.rollout.workers import RolloutWorker
from distill_cli.types import Prompt, Rollout


@dataclass(frozen=True)
class Score:
    """Over all answers to the validation prompts, of all ranks."""

    accuracy: float
    mean_length: float
    """Tokens of an answer."""
    truncated_rate: float
    """Share of answers that reached their length limit."""
    num_samples: int
    datasets: dict[str, float] = field(default_factory=dict)
    """Accuracy on each dataset, where there are several."""

    def metrics(self) -> dict[str, float]:
        return {
            "val/accuracy": self.accuracy,
            "val/mean_length": self.mean_length,
            "val/truncated_rate": self.truncated_rate,
            **{f"val/{name}/accuracy": accuracy for name, accuracy in self.datasets.items()},
        }


@dataclass(frozen=True)
class Answer:
    """One of the answers to a problem."""

    number: int
    """Among those to its problem, from 0."""
    rollout: Rollout


def answer_row(answer: Answer, *, decode: Callable, extract: Callable | None) -> dict[str, Any]:
    """A row of `track.answers`."""
    rollout, example = answer.rollout, answer.rollout.prompt.example
    response = last_turn = decode(rollout.sample.token_ids)
    if rollout.sample.num_turns > 1:
        last_turn = decode(rollout.sample.last_turn_ids)
    return {
        "dataset": example.dataset,
        "problem": rollout.prompt.index,
        "number": answer.number,
        "question": example.question,
        "reference": example.answer,
        "response": response,
        "final_answer": extract(last_turn) if extract else None,
        "reward": float(rollout.reward or 0.0),
        "num_tokens": len(rollout.sample.written_ids),
        "finish_reason": rollout.sample.finish_reason,
    }


def first_of_each(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """The first `number` prompts of each dataset."""
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        taken[prompt.example.dataset] += 1
        if taken[prompt.example.dataset] <= number:
            chosen.append(prompt)
    return chosen


@dataclass(frozen=True)
class Validator:
    """The problems, and how they are answered and judged."""

    prompts: Sequence[Prompt]
    sampling: SamplingSettings
    verify: IsolatedVerifier
    decode: Callable[[list[int]], str]
    batch_size: int
    """Answers that an engine is asked for at a time."""
    seed: int
    parallel: Parallel
    repeat: int = 1
    """Answers to each problem."""
    turns: Turns | None = None
    """How an answer goes on after its first turn; None where it does not."""

    def for_teacher(self) -> Validator:
        """Return the same problems as the teacher reads them."""
        return replace(self, prompts=[replace(prompt, token_ids=prompt.ids_for_teacher) for prompt in self.prompts])

    def run(self, engine: AnsweringEngine) -> Score:
        """Score the engine's answers. A collective: each engine answers its share."""
        names = sorted({prompt.example.dataset for prompt in self.prompts})
        totals = torch.zeros(len(names), 4, dtype=torch.float64, device=self.parallel.device)
        for answer in (answer for batch in self.answers(engine) for answer in batch):
            rollout = answer.rollout
            truncated = float(rollout.sample.finish_reason == "length")
            row = torch.tensor([rollout.reward or 0.0, len(rollout.sample.written_ids), truncated, 1.0])
            totals[names.index(rollout.prompt.example.dataset)] += row.to(totals)
        if not self.share(engine).is_first:
            totals.zero_()
        totals = self.parallel.sum_of_ranks(totals)
        right, length, truncated, number = totals.sum(0).tolist()
        by_dataset = {name: row[0] / row[3] for name, row in zip(names, totals.tolist(), strict=True)}
        return Score(
            right / number, length / number, truncated / number, int(number), by_dataset if len(names) > 1 else {}
        )

    def answers(self, engine: AnsweringEngine) -> Iterator[list[Answer]]:
        """Yield the share of this rank's engine, a batch at a time; one engine gives all answers to a problem."""
        engines = self.share(engine)
        mine = partition_by_cost([len(prompt.token_ids) for prompt in self.prompts], engines.num_engines)[engines.index]
        asked = [(problem, number) for problem in mine for number in range(self.repeat)]
        for begin in range(0, len(asked), self.batch_size):
            batch = asked[begin : begin + self.batch_size]
            rollouts = sample_rollouts(
                [self.prompts[problem] for problem, _ in batch],
                # The same at every validation, and none of training's: what differs is the model.
                seeds=[sequence_seed(self.seed, step=-number, sequence=problem) for problem, number in batch],
                engine=engine,
                sampling=self.sampling,
                turns=self.turns,
            )
            judged = judge_rollouts(rollouts, verify=self.verify, decode=self.decode)
            yield [Answer(number, rollout) for (_, number), rollout in zip(batch, judged, strict=True)]

    def share(self, engine: AnsweringEngine) -> EngineShare:
        return EngineShare.of_all_ranks(engine.num_ranks, self.parallel)


@dataclass(frozen=True)
class Validation:
    """The validations of a run, in which engines take their turn with the device's memory."""

    validator: Validator
    worker: RolloutWorker
    teacher: Teacher | None = None
    """The teacher, if it is measured."""

    def score_student(self) -> Score:
        """Score the student as it is. A collective."""
        with self.worker.ready() as sampler, self.worker.stages("eval"):
            score = self.validator.run(sampler)
        return score

    def score_teacher(self) -> Score:
        """Score the teacher. A collective."""
        with self.worker.stages.awake(self.teacher), self.worker.stages("eval"):
            score = self.validator.for_teacher().run(self.teacher)
        self.worker.stages.check_stop()
        return score
