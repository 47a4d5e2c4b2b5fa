"""Answer a benchmark's problems, once or several times each, and judge the answers: for validation and `eval`."""

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
    """Means over all answers to the validation prompts, of all ranks."""

    accuracy: float
    mean_length: float
    """Tokens per answer."""
    truncated_rate: float
    """Share of answers that reached the length limit."""
    num_samples: int
    datasets: dict[str, float] = field(default_factory=dict)
    """Accuracy by dataset, if there are several."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a validation."""
        means = {name: getattr(self, name) for name in ("accuracy", "mean_length", "truncated_rate")}
        means |= {f"{name}/accuracy": accuracy for name, accuracy in self.datasets.items()}
        return {f"val/{name}": value for name, value in means.items()}


@dataclass(frozen=True)
class Answer:
    """One of the answers to a problem."""

    number: int
    """Position among the answers to the problem, from 0."""
    rollout: Rollout


def answer_row(
    answer: Answer, *, decode: Callable[[list[int]], str], extract: Callable[[str], str | None] | None
) -> dict[str, Any]:
    """Return an answer as a row of `folders.answers_table`.

    Args:
        extract: returns the final answer of a text, as the verifier reads it; None if the verifier has no such part.
    """
    sample, example = answer.rollout.sample, answer.rollout.prompt.example
    return {
        "dataset": example.dataset,
        "problem": answer.rollout.prompt.index,
        "number": answer.number,
        "question": example.question,
        "reference": example.answer,
        "response": decode(sample.token_ids),
        "final_answer": extract(decode(sample.last_turn_ids)) if extract else None,
        "reward": float(answer.rollout.reward or 0.0),
        "num_tokens": len(sample.written_ids),
        "finish_reason": sample.finish_reason,
    }


def first_of_each(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """Return the first `number` prompts of each dataset."""
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
    """Answers per call of an engine."""
    seed: int
    parallel: Parallel
    repeat: int = 1
    """Answers to each problem."""
    turns: Turns | None = None
    """How an answer continues after its first turn; None if it does not."""

    def for_teacher(self) -> Validator:
        """Return the same problems as the teacher reads them."""
        return replace(self, prompts=[replace(prompt, token_ids=prompt.ids_for_teacher) for prompt in self.prompts])

    def run(self, engine: AnsweringEngine) -> Score:
        """Score the engine's answers. A collective: each engine answers its share."""
        names = sorted({prompt.example.dataset for prompt in self.prompts})
        totals = torch.zeros(len(names), 4, dtype=torch.float64, device=self.parallel.device)
        for rollout in (answer.rollout for answers in self.answers(engine) for answer in answers):
            truncated = float(rollout.sample.finish_reason == "length")
            row = torch.tensor([rollout.reward or 0.0, len(rollout.sample.written_ids), truncated, 1.0])
            totals[names.index(rollout.prompt.example.dataset)] += row.to(totals)
        totals = self.parallel.sum_of_ranks(totals * self.share(engine).is_first)
        right, length, truncated, number = totals.sum(0).tolist()
        by_dataset = {name: row[0] / row[3] for name, row in zip(names, totals.tolist(), strict=True)}
        means = (right / number, length / number, truncated / number)
        return Score(*means, int(number), by_dataset if len(names) > 1 else {})

    def answers(self, engine: AnsweringEngine) -> Iterator[list[Answer]]:
        """Yield the answers of this rank's engine in batches; one engine gives all answers to a problem."""
        share = self.share(engine)
        mine = partition_by_cost([len(prompt.token_ids) for prompt in self.prompts], share.num_engines)[share.index]
        requests = [(problem, number) for problem in mine for number in range(self.repeat)]
        for begin in range(0, len(requests), self.batch_size):
            batch = requests[begin : begin + self.batch_size]
            rollouts = sample_rollouts(
                [self.prompts[problem] for problem, _ in batch],
                # Equal in all validations, so that only the model differs, and unlike training's.
                seeds=[sequence_seed(self.seed, step=-number, sequence=problem) for problem, number in batch],
                engine=engine,
                sampling=self.sampling,
                turns=self.turns,
            )
            judged = judge_rollouts(rollouts, verify=self.verify, decode=self.decode)
            yield [Answer(number, rollout) for (_, number), rollout in zip(batch, judged, strict=True)]

    def share(self, engine: AnsweringEngine) -> EngineShare:
        """Return this rank's place among the engines that share the problems."""
        return EngineShare.of_all_ranks(engine.num_ranks, self.parallel)


@dataclass(frozen=True)
class Validation:
    """Validate models during a run, in which engines take turns with the device's memory."""

    validator: Validator
    worker: RolloutWorker
    teacher: Teacher | None = None
    """The teacher, if it is measured."""

    def score_student(self) -> Score:
        """Score the student with its current weights. A collective."""
        with self.worker.ready() as sampler, self.worker.stages("eval"):
            score = self.validator.run(sampler)
        return score

    def score_teacher(self) -> Score:
        """Score the teacher. A collective."""
        assert self.teacher is not None
        stages = self.worker.stages
        with stages.awake(self.teacher), stages("eval"):
            score = self.validator.for_teacher().run(self.teacher)
        stages.check_stop()
        return score
