"""The recorded answers as a page shows them: tokens with both models' view, KL by position, the worst tokens.

Texts of all tokens stand once in a table; an answer's tokens are numbers of its rows. A page holds MAX_TOKENS tokens:
where there are more, answers are cut, and the page says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from distill_cli.report.history import History

MAX_TOKENS = 60_000
"""Of all answers of a page: what fits beside the rest in 5 MB."""
NUM_WORST = 12
MAX_POSITIONS = 100
"""Points of a curve; neighbouring positions share one where there are more."""
SCALARS = ("loss", "kl_forward", "kl_reverse", "entropy", "student_logp", "teacher_logp")


@dataclass
class Answer:
    """A row of a rollouts file."""

    run: int
    step: int
    row: dict[str, Any]

    @property
    def length(self) -> int:
        return len(self.row["tokens"])


@dataclass
class TokenTable:
    """Texts, each once."""

    texts: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        if text not in self.numbers:
            self.numbers[text] = len(self.texts)
            self.texts.append(text)
        return self.numbers[text]


def read_answers(histories: Sequence[History]) -> list[Answer]:
    """Of one run every recorded step; of several the first and the last of each."""
    answers = []
    for number, history in enumerate(histories):
        files = history.sample_files
        if len(histories) > 1 and len(files) > 2:
            files = [files[0], files[-1]]
        for step, file in files:
            answers += [Answer(number, step, row) for row in _rows(file)]
    return answers


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = pyarrow.parquet.read_table(file).to_pylist()
    return [row for row in rows if "kl_forward" in row]


def page_samples(histories: Sequence[History], answers: Sequence[Answer]) -> dict[str, Any]:
    """What the page's script draws the disagreement view from."""
    table = TokenTable()
    limit = longest_shown([answer.length for answer in answers])
    prompts: dict[int, str] = {}
    for answer in answers:
        prompts.setdefault(answer.row["prompt_index"], answer.row["prompt"])
    order = {index: place for place, index in enumerate(prompts)}
    shown = [_page_answer(answer, order[answer.row["prompt_index"]], table, limit) for answer in answers]
    everything = sorted(value for answer in shown for value in answer["kl_forward"])
    return {
        "runs": [history.name for history in histories],
        "prompts": [{"index": index, "text": text} for index, text in prompts.items()],
        "answers": shown,
        "tokens": table.texts,
        "worst": worst_tokens(answers, order),
        "cut": sum(max(answer.length - limit, 0) for answer in answers),
        "scale": max(everything[int(0.99 * (len(everything) - 1))], 1e-3) if everything else 1.0,
    }


def longest_shown(lengths: Sequence[int]) -> int:
    """Where answers are cut, so that all together are at most MAX_TOKENS: the short ones leave the long ones room."""
    room, left = MAX_TOKENS, len(lengths)
    for length in sorted(lengths):
        if length * left > room:
            return room // left
        room, left = room - length, left - 1
    return max(lengths, default=0)


def _page_answer(answer: Answer, prompt: int, table: TokenTable, limit: int) -> dict[str, Any]:
    row = answer.row
    shown = {
        "run": answer.run,
        "step": answer.step,
        "prompt": prompt,
        "reward": row["reward"],
        "finish": row["finish_reason"],
        "length": answer.length,
        "mean": _rounded(sum(row["kl_forward"]) / max(answer.length, 1)),
        "tokens": [table.number(text) for text in row["tokens"][:limit]],
    }
    for name in SCALARS:
        shown[name] = [_rounded(value) for value in row[name][:limit]]
    for role in ("student", "teacher"):
        shown[f"{role}_top"] = [[table.number(text) for text in texts] for texts in row[f"{role}_top_tokens"][:limit]]
        shown[f"{role}_p"] = [[round(value, 2) for value in values] for values in row[f"{role}_top_logp"][:limit]]
    return shown


def worst_tokens(answers: Sequence[Answer], order: dict[int, int]) -> list[dict[str, Any]]:
    """The tokens of highest KL, of each run's first and last recorded step."""
    found = []
    for run in sorted({answer.run for answer in answers}):
        of_run = [answer for answer in answers if answer.run == run]
        steps = sorted({answer.step for answer in of_run})
        for step in dict.fromkeys((steps[0], steps[-1])):
            tokens = [
                (value, position, answer)
                for answer in of_run
                if answer.step == step
                for position, value in enumerate(answer.row["kl_forward"])
            ]
            tokens.sort(key=lambda token: -token[0])
            found += [_worst(*token, order=order) for token in tokens[:NUM_WORST]]
    return found


def _worst(value: float, position: int, answer: Answer, *, order: dict[int, int]) -> dict[str, Any]:
    row = answer.row
    return {
        "run": answer.run,
        "step": answer.step,
        "prompt": order[row["prompt_index"]],
        "position": position,
        "kl": _rounded(value),
        "before": "".join(row["tokens"][max(0, position - 12) : position]),
        "token": row["tokens"][position],
        "student": [row["student_top_tokens"][position][0], round(row["student_top_logp"][position][0], 2)],
        "teacher": [row["teacher_top_tokens"][position][0], round(row["teacher_top_logp"][position][0], 2)],
    }


def position_rows(histories: Sequence[History], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The `positions` dataset: mean KL forward by position, of each run's first and last recorded step."""
    rows = []
    for number, history in enumerate(histories):
        of_run = [answer for answer in answers if answer.run == number]
        steps = sorted({answer.step for answer in of_run})
        width = -(-max((answer.length for answer in of_run), default=0) // MAX_POSITIONS) or 1
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            when = f"step {step}" + (", before training" if step == 0 else "")
            sums: dict[int, list[float]] = defaultdict(list)
            count: dict[int, int] = defaultdict(int)
            for answer in of_run:
                if answer.step == step:
                    for position, value in enumerate(answer.row["kl_forward"]):
                        sums[position // width].append(value)
                        count[position // width] += position % width == 0
            rows += [
                {
                    "run": history.name,
                    "when": when,
                    "position": bucket * width + (width - 1) / 2,
                    "label": str(bucket) if width == 1 else f"{bucket * width} to {(bucket + 1) * width - 1}",
                    "kl": _rounded(sum(values) / len(values)),
                    "count": count[bucket],
                }
                for bucket, values in sorted(sums.items())
            ]
    return rows


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
