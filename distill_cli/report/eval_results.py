"""Models compared on a benchmark: numbers from their answers, as a table and as JSON. No torch."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from distill_cli.folders.answers_table import read_answers
from distill_cli.report import significance
from distill_cli.report.significance import RIGHT, Difference, Estimate

COLUMNS = ("dataset", "problem", "final_answer", "reward", "num_tokens", "finish_reason")
ProblemKey = tuple[str, int]
"""A dataset and the index of a problem in the data: answers of two models are paired by it."""


Problem = list[dict[str, Any]]
"""The answers of one model to one problem, in their order, with `COLUMNS`."""


@dataclass(frozen=True)
class Score:
    """One model on one dataset, or on all."""

    num_problems: int
    num_answers: int
    accuracy: Estimate
    """pass@1: the mean over all answers (avg@k)."""
    pass_at: dict[int, Estimate]
    """k -> pass@k, for 2, 4, ... and the number of answers per problem."""
    majority: Estimate | None
    """Over all answers to a problem; None for one answer per problem, or a verifier without final answers."""
    mean_length: float
    """Tokens per answer."""
    truncated_rate: float

    def estimates(self) -> Iterator[tuple[str, Estimate]]:
        """Yield the columns of the table: accuracy, pass@k for the largest k (the JSON has all), majority."""
        yield "accuracy", self.accuracy
        if self.pass_at:
            yield f"pass@{max(self.pass_at)}", self.pass_at[max(self.pass_at)]
        if self.majority:
            yield f"majority@{self.num_answers // self.num_problems}", self.majority


@dataclass(frozen=True)
class Scoreboard:
    """All numbers of an evaluation. The others are compared with the first model."""

    scores: dict[str, dict[str, Score]]
    """Dataset -> model -> score; the last dataset is `total` if there are several."""
    differences: dict[str, dict[str, Difference]]
    """Dataset -> other model -> the first model's accuracy minus the other's."""
    gap_closed: dict[str, Estimate]
    """Dataset -> the share of the way from `before` to `teacher`, if both were evaluated and there is a gap."""


def read_problems(file: Path, *, unnamed: str) -> dict[ProblemKey, Problem]:
    """Return a model's answers by problem; `unnamed` is the name of a dataset without one."""
    problems: dict[ProblemKey, Problem] = defaultdict(list)
    for row in read_answers(file, COLUMNS):
        problems[row["dataset"] or unnamed, row["problem"]].append(row)
    return problems


def make_scoreboard(models: Mapping[str, dict[ProblemKey, Problem]], *, has_votes: bool) -> Scoreboard:
    """Compare models on the problems that all of them answered.

    Args:
        models: name -> answers; the first model is the measured one, `before` and `teacher` have those roles.
        has_votes: the verifier extracts final answers.
    """
    common = sorted(set.intersection(*(set(problems) for problems in models.values())))
    parts = {dataset: list(keys) for dataset, keys in groupby(common, key=itemgetter(0))}
    if len(parts) > 1:
        parts["total"] = common
    first, *others = models
    board = Scoreboard({}, {}, {})
    for part, keys in parts.items():
        problems_of = {name: [problems[key] for key in keys] for name, problems in models.items()}
        accuracy = {name: _accuracies(problems) for name, problems in problems_of.items()}
        board.scores[part] = {name: _score(problems, has_votes=has_votes) for name, problems in problems_of.items()}
        board.differences[part] = {other: significance.difference(accuracy[first], accuracy[other]) for other in others}
        if {"before", "teacher"} <= set(others):
            gap = significance.gap_closed(accuracy["before"], accuracy[first], accuracy["teacher"])
            board.gap_closed.update({part: gap} if gap else {})
    return board


def _accuracies(problems: Sequence[Problem]) -> list[float]:
    return [sum(answer["reward"] for answer in problem) / len(problem) for problem in problems]


def _score(problems: Sequence[Problem], *, has_votes: bool) -> Score:
    num_samples = len(problems[0])
    ks = [2**power for power in range(1, num_samples.bit_length()) if 2**power < num_samples]
    ks += [num_samples] if num_samples > 1 else []
    answers = [answer for problem in problems for answer in problem]
    num_right = [sum(answer["reward"] > RIGHT for answer in problem) for problem in problems]
    values = [_accuracies(problems)]
    values += [[significance.pass_at(k, num_right=right, num_samples=num_samples) for right in num_right] for k in ks]
    if votes := has_votes and num_samples > 1:
        columns = [[[a[name] for a in problem] for name in ("final_answer", "reward")] for problem in problems]
        values.append([significance.majority(*both) for both in columns])
    accuracy, *others = significance.estimates(values)
    return Score(
        num_problems=len(problems),
        num_answers=len(answers),
        accuracy=accuracy,
        pass_at=dict(zip(ks, others, strict=False)),
        majority=others[-1] if votes else None,
        mean_length=sum(answer["num_tokens"] for answer in answers) / len(answers),
        truncated_rate=sum(answer["finish_reason"] == "length" for answer in answers) / len(answers),
    )


def print_scoreboard(console: Console, board: Scoreboard) -> None:
    """Print a table for each dataset, the differences from the first model, and the gap closed."""
    for dataset, scores in board.scores.items():
        first, score = next(iter(scores.items()))
        counts = f"{score.num_problems} problems, {score.num_answers // score.num_problems} answers to each"
        console.print(f"[bold]{escape(dataset)}[/]", f"{counts}; 95% intervals")
        console.print(_score_table(scores))
        for other, difference in board.differences[dataset].items():
            p_value = "p < 0.0001" if difference.p_value < 1e-4 else f"p = {difference.p_value:.4f}"
            points = f"{100 * difference.estimate.value:+.1f} points {_interval(difference.estimate, '+.1f')}"
            console.print(f"{first} - {other}: {points}, {p_value} (paired sign flips)", markup=False)
        if gap := board.gap_closed.get(dataset):
            console.print(f"gap closed: {gap.value:.0%} [{gap.low:.0%}, {gap.high:.0%}]", markup=False)


def _score_table(scores: Mapping[str, Score]) -> Table:
    table = Table(Column("model", overflow="fold"), box=None, pad_edge=False)
    names = [name for name, _ in next(iter(scores.values())).estimates()]
    for column in (*names, "length", "truncated"):
        table.add_column(column, justify="right", no_wrap=True)
    for model, score in scores.items():
        cells = [escape(f"{one.value:.1%} {_interval(one)}") for _, one in score.estimates()]
        table.add_row(escape(model), *cells, f"{score.mean_length:.0f}", f"{score.truncated_rate:.1%}")
    return table


def _interval(estimate: Estimate, form: str = ".1f") -> str:
    return f"[{100 * estimate.low:{form}}, {100 * estimate.high:{form}}]"
