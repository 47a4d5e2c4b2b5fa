"""Models side by side on a benchmark: numbers from their answers, as a table and as JSON. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_cli.folders.answers_table import read_answers
from distill_cli.report.significance import (
    RIGHT,
    Difference,
    Estimate,
    difference,
    estimates,
    gap_closed,
    majority,
    pass_at,
)

COLUMNS = ("dataset", "problem", "final_answer", "reward", "num_tokens", "finish_reason")
ProblemKey = tuple[str, int]
"""A dataset and the place of a problem in the data: what answers of two models are paired by."""


@dataclass(frozen=True)
class Problem:
    """The answers of one model to one problem, in their order."""

    rewards: list[float]
    votes: list[str | None]
    lengths: list[int]
    truncated: list[bool]

    @property
    def accuracy(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    @property
    def num_right(self) -> int:
        return sum(reward > RIGHT for reward in self.rewards)


@dataclass(frozen=True)
class Score:
    """Of one model on one dataset, or on all."""

    num_problems: int
    num_answers: int
    accuracy: Estimate
    """pass@1: the mean over all answers (avg@k)."""
    pass_at: dict[int, Estimate]
    """k -> pass@k, for 2, 4, ... and the number of answers to a problem."""
    majority: Estimate | None
    """Over all answers to a problem; None for one answer, or a verifier that tells no final answer."""
    mean_length: float
    """Tokens of an answer."""
    truncated_rate: float


@dataclass(frozen=True)
class Scoreboard:
    """Everything that is shown. The first model is the one that the others are set against."""

    scores: dict[str, dict[str, Score]]
    """Dataset -> model -> score; where there are several datasets, the last is `total`."""
    differences: dict[str, dict[str, Difference]]
    """Dataset -> other model -> the first model's accuracy less its own."""
    gap_closed: dict[str, Estimate]
    """Dataset -> the share of the way from `before` to `teacher`, where both were asked and there is a gap."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_problems(file: Path, *, unnamed: str) -> dict[ProblemKey, Problem]:
    """A model's answers, by problem; `unnamed` is what a dataset is called that has no name of its own."""
    rows_of = defaultdict(list)
    for row in read_answers(file, COLUMNS):
        rows_of[row["dataset"] or unnamed, row["problem"]].append(row)
    return {
        key: Problem(
            rewards=[row["reward"] for row in rows],
            votes=[row["final_answer"] for row in rows],
            lengths=[row["num_tokens"] for row in rows],
            truncated=[row["finish_reason"] == "length" for row in rows],
        )
        for key, rows in rows_of.items()
    }


def make_scoreboard(models: Mapping[str, dict[ProblemKey, Problem]], *, has_votes: bool) -> Scoreboard:
    """Sets models side by side on the problems that all of them were asked.

    Args:
        models: name -> answers; the first is the one that is measured, `before` and `teacher` have those roles.
        has_votes: the verifier tells final answers apart.
    """
    common = sorted(set.intersection(*(set(problems) for problems in models.values())))
    names = list(dict.fromkeys(dataset for dataset, _ in common))
    parts = {name: [key for key in common if key[0] == name] for name in names}
    if len(names) > 1:
        parts["total"] = common
    first, *others = models
    scores, differences, gaps = {}, {}, {}
    for part, keys in parts.items():
        asked = {name: [problems[key] for key in keys] for name, problems in models.items()}
        accuracy = {name: [problem.accuracy for problem in problems] for name, problems in asked.items()}
        scores[part] = {name: score(problems, has_votes=has_votes) for name, problems in asked.items()}
        differences[part] = {other: difference(accuracy[first], accuracy[other]) for other in others}
        if {"before", "teacher"} <= set(others):
            gap = gap_closed(accuracy["before"], accuracy[first], accuracy["teacher"])
            if gap is not None:
                gaps[part] = gap
    return Scoreboard(scores, differences, gaps)


def score(problems: Sequence[Problem], *, has_votes: bool) -> Score:
    num_samples = len(problems[0].rewards)
    draws = [2**power for power in range(1, num_samples.bit_length()) if 2**power < num_samples]
    draws += [num_samples] if num_samples > 1 else []
    lengths = [length for problem in problems for length in problem.lengths]
    truncated = [cut for problem in problems for cut in problem.truncated]
    passed = [[pass_at(k, num_right=problem.num_right, num_samples=num_samples) for problem in problems] for k in draws]
    voted = [[majority(problem.votes, problem.rewards) for problem in problems]] if has_votes and draws else []
    found = estimates([[problem.accuracy for problem in problems], *passed, *voted])
    return Score(
        num_problems=len(problems),
        num_answers=len(lengths),
        accuracy=found[0],
        pass_at=dict(zip(draws, found[1 : 1 + len(draws)], strict=True)),
        majority=found[-1] if voted else None,
        mean_length=sum(lengths) / len(lengths),
        truncated_rate=sum(truncated) / len(truncated),
    )


def print_scoreboard(console: Console, board: Scoreboard) -> None:
    for dataset, scores in board.scores.items():
        console.print(f"[bold]{escape(dataset)}[/]", *_counts(scores))
        console.print(score_table(scores))
        first = next(iter(scores))
        for other, found in board.differences[dataset].items():
            console.print(f"{escape(first)} - {escape(other)}: {difference_text(found)}")
        if dataset in board.gap_closed:
            gap = board.gap_closed[dataset]
            console.print(f"gap closed: {gap.value:.0%} [{gap.low:.0%}, {gap.high:.0%}]", markup=False)


def _counts(scores: Mapping[str, Score]) -> Iterator[str]:
    one = next(iter(scores.values()))
    yield f"{one.num_problems} problems, {one.num_answers // one.num_problems} answers to each; 95% intervals"


def score_table(scores: Mapping[str, Score]) -> Table:
    one = next(iter(scores.values()))
    draws = [k for k in one.pass_at if k == max(one.pass_at)]  # the others are in the JSON
    num_samples = one.num_answers // one.num_problems
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    columns = ["accuracy", *(f"pass@{k}" for k in draws), *([f"majority@{num_samples}"] if one.majority else [])]
    for column in (*columns, "length", "truncated"):
        table.add_column(column, justify="right", no_wrap=True)
    for model, found in scores.items():
        estimates = [found.accuracy, *(found.pass_at[k] for k in draws), *([found.majority] if found.majority else [])]
        cells = [escape(percent(value)) for value in estimates]
        table.add_row(escape(model), *cells, f"{found.mean_length:.0f}", f"{found.truncated_rate:.1%}")
    return table


def percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def difference_text(found: Difference) -> str:
    value, p = found.estimate, found.p_value
    said = "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
    return escape(
        f"{100 * value.value:+.1f} points [{100 * value.low:+.1f}, {100 * value.high:+.1f}], {said} (paired sign flips)"
    )
