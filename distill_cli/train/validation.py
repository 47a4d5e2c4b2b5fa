"""Answer a benchmark's problems, once or several times each, and judge the answers: for validation and `eval`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch

from distill_cli.engines.base import AnsweringEngine, Teacher
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.sharing import EngineShare, partition_by_cost
from distill_cli.rollout.remote import SamplingRanks
from distill_cli.rollout.workers import Responder, RolloutWorker
from distill_cli.tokens.translation import Translation
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

    @classmethod
    def of(cls, totals: torch.Tensor, datasets: Sequence[str]) -> Score:
        """Return the means of `Validator.totals`; zeros if there are no answers."""
        right, length, truncated, number = totals.sum(0).tolist()
        rows = zip(datasets, totals.tolist(), strict=True)
        by_dataset = {name: row[0] / row[3] for name, row in rows if row[3]}
        accuracy, mean_length, truncated_rate = (total / max(number, 1e-9) for total in (right, length, truncated))
        return cls(accuracy, mean_length, truncated_rate, round(number), by_dataset if len(datasets) > 1 else {})

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a validation."""
        means = {name: getattr(self, name) for name in ("accuracy", "mean_length", "truncated_rate")}
        means |= {f"{name}/accuracy": accuracy for name, accuracy in self.datasets.items()}
        return {f"val/{name}": value for name, value in means.items()}


Answer = tuple[int, Rollout]
"""One of the answers to a problem, after its position among them, from 0."""


def answer_row(
    answer: Answer, *, decode: Callable[[list[int]], str], extract: Callable[[str], str | None] | None
) -> dict[str, Any]:
    """Return an answer as a row of `folders.answers_table`.

    Args:
        extract: returns the final answer of a text, as the verifier reads it; None if the verifier has no such part.
    """
    number, rollout = answer
    sample, example = rollout.sample, rollout.prompt.example
    return {
        "dataset": example.dataset,
        "problem": rollout.prompt.index,
        "number": number,
        "question": example.question,
        "reference": example.answer,
        "response": decode(sample.token_ids),
        "final_answer": extract(decode(sample.last_turn_ids)) if extract else None,
        "reward": float(rollout.reward or 0.0),
        "num_tokens": len(sample.written_ids),
        "finish_reason": sample.finish_reason,
    }


def first_of_each(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """Return the first `number` prompts of each dataset."""
    taken: dict[str, Iterator[int]] = defaultdict(count)
    return [prompt for prompt in prompts if next(taken[prompt.example.dataset]) < number]


@dataclass(frozen=True)
class Validator:
    """The problems, and how they are answered and judged."""

    prompts: Sequence[Prompt]
    responder: Responder
    batch_size: int
    """Answers per call of an engine."""
    parallel: Parallel
    repeat: int = 1
    """Answers to each problem."""

    @property
    def datasets(self) -> list[str]:
        """The names of the problems' datasets, in alphabetical order."""
        return sorted({prompt.example.dataset for prompt in self.prompts})

    def for_teacher(self, index: int, translation: Translation | None = None) -> Validator:
        """Return the problems of one teacher, as it reads them; they keep their weights for it.

        Args:
            translation: to its tokens, if it has a tokenizer of its own.
        """
        prompts = [
            replace(prompt, token_ids=prompt.ids_for(target), targets=(target,))
            for prompt in self.prompts
            for target in prompt.targets
            if target.teacher == index
        ]
        responder = self.responder
        if translation is not None:
            sampling = translation.sampling(responder.sampling)
            responder = replace(responder, sampling=sampling, decode=translation.decode)
        return replace(self, prompts=prompts, responder=responder)

    def run(self, engine: AnsweringEngine) -> Score:
        """Score the engine's answers. A collective: each engine answers its share."""
        return Score.of(self.totals(engine, self.datasets), self.datasets)

    def totals(
        self,
        engine: AnsweringEngine,
        datasets: Sequence[str],
        *,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> torch.Tensor:
        """Return sums over the engine's answers, each with the weight of its problem: float64 [datasets, 4].

        The columns are rewards, tokens, truncated answers and answers. A collective.

        Args:
            within: returns a context in which the engine answers.
        """
        totals = torch.zeros(len(datasets), 4, dtype=torch.float64, device=self.parallel.device)
        with within():
            for _, rollout in (answer for answers in self.answers(engine) for answer in answers):
                truncated = float(rollout.sample.finish_reason == "length")
                row = torch.tensor([rollout.reward or 0.0, len(rollout.sample.written_ids), truncated, 1.0])
                weight = sum(target.weight for target in rollout.prompt.targets)
                totals[datasets.index(rollout.prompt.example.dataset)] += weight * row.to(totals)
        return self.parallel.sum_of_ranks(totals * self.share(engine).is_first)

    def answers(self, engine: AnsweringEngine) -> Iterator[list[Answer]]:
        """Yield the answers of this rank's engine in batches; one engine gives all answers to a problem."""
        share = self.share(engine)
        mine = partition_by_cost([len(prompt.token_ids) for prompt in self.prompts], share.num_engines)[share.index]
        requests = [(problem, number) for problem in mine for number in range(self.repeat)]
        for begin in range(0, len(requests), self.batch_size):
            batch = requests[begin : begin + self.batch_size]
            # Equal in all validations, so that only the model differs, and unlike training's.
            seeds = [self.responder.seed_of(step=-number, sequence=problem) for problem, number in batch]
            rollouts = self.responder.respond(engine, [self.prompts[problem] for problem, _ in batch], seeds=seeds)
            yield [(number, rollout) for (_, number), rollout in zip(batch, rollouts, strict=True)]

    def share(self, engine: AnsweringEngine) -> EngineShare:
        """Return this rank's place among the engines that share the problems."""
        return EngineShare.of_all_ranks(engine.num_ranks, self.parallel)


@dataclass(frozen=True)
class Validation:
    """Validate models during a run, in which engines take turns with the device's memory."""

    validator: Validator
    worker: RolloutWorker | SamplingRanks
    teachers: Sequence[Teacher] = ()
    """The teachers, in the config's order, if they are measured."""
    translations: Mapping[int, Translation] = field(default_factory=dict)
    """By index of the teachers with a tokenizer of their own."""

    def score_student(self) -> Score:
        """Score the student with its current weights. A collective."""
        if isinstance(self.worker, SamplingRanks):
            score: Score = self.worker.validate()
            return score
        with self.worker.ready() as sampler, self.worker.stages("eval"):
            return self.validator.run(sampler)

    def score_teachers(self) -> tuple[Score, list[Score]]:
        """Score all teachers together, each on its own problems, and each of them alone. A collective."""
        stages, datasets, each = self.worker.stages, self.validator.datasets, []
        for index, teacher in enumerate(self.teachers):
            with stages.awake(teacher), stages("eval"):
                validator = self.validator.for_teacher(index, self.translations.get(index))
                each.append(validator.totals(teacher, datasets, within=stages.unless_lost))
            stages.check_stop()
        return Score.of(torch.stack(each).sum(0), datasets), [Score.of(totals, datasets) for totals in each]
