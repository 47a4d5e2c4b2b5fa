"""The recorded answers as a page shows them: tokens with both models' view, KL by position, the worst tokens.

Texts of all tokens stand once in a table; an answer's tokens are numbers of its rows. A page holds MAX_TOKENS tokens:
where there are more, answers are cut, and the page says so.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from distill_cli.report.history import History

MAX_TOKENS = 35_000
"""Of all answers of a page: what fits beside the rest in 5 MB."""
NUM_WORST = 12
MAX_POSITIONS = 100
"""Points of a curve; neighbouring positions share one where there are more."""
SCALARS = ("loss", "kl_forward", "kl_reverse", "entropy", "student_logp", "teacher_logp")
ROLES = ("student", "teacher")
TURNS = {"system", "user", "assistant", "model"}
"""What is left of a chat template's markers where special tokens are left out."""


@dataclass
class Answer:
    """A row of a rollouts file."""

    run: int
    step: int
    row: dict[str, Any]
    """Lists by token are cut where the page cuts them."""
    kl: list[float | None]
    """KL forward of every token; None where a token reaches no loss."""

    @property
    def length(self) -> int:
        return len(self.kl)


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
    """Of one run every recorded step; of several the first and the last of each. Long ones are cut."""
    tables = []
    for number, history in enumerate(histories):
        files = history.sample_files
        if len(histories) > 1 and len(files) > 2:
            files = [files[0], files[-1]]
        tables += [(number, step, pyarrow.parquet.read_table(file)) for step, file in files]
    tables = [(number, step, table) for number, step, table in tables if "kl_forward" in table.column_names]
    kls = [table["kl_forward"].to_pylist() for _, _, table in tables]
    limit = longest_shown([len(kl) for of_table in kls for kl in of_table])
    return [
        Answer(number, step, row, kl)
        for (number, step, table), of_table in zip(tables, kls, strict=True)
        for row, kl in zip(_cut(table, limit), of_table, strict=True)
    ]


def _cut(table: pyarrow.Table, limit: int) -> list[dict[str, Any]]:
    """The rows, with the first `limit` tokens of what is listed by token."""
    by_token = [*SCALARS, "tokens", *(f"{role}_top_{what}" for role in ROLES for what in ("tokens", "logp"))]
    columns = {name: table[name] for name in ("prompt_index", "prompt", "finish_reason", "reward")}
    if limit:
        columns |= {name: pyarrow.compute.list_slice(table[name], 0, limit) for name in by_token}
    else:
        columns |= {name: table[name] for name in by_token}
    return pyarrow.table(columns).to_pylist()


def page_samples(answers: Sequence[Answer]) -> dict[str, Any]:
    """What the page's script draws the disagreement view from."""
    table = TokenTable()
    prompts: dict[int, str] = {}
    for answer in answers:
        prompts.setdefault(answer.row["prompt_index"], answer.row["prompt"])
    order = {index: place for place, index in enumerate(prompts)}
    shown = [_page_answer(answer, order[answer.row["prompt_index"]], table) for answer in answers]
    return {
        "prompts": [{"index": index, "text": text, "name": name_of(text)} for index, text in prompts.items()],
        "answers": shown,
        "tokens": table.texts,
        "worst": worst_tokens(answers, order),
        "cut": sum(answer.length - len(answer.row["tokens"]) for answer in answers),
        "scale": colour_scale(shown),
    }


def name_of(prompt: str) -> str:
    """A prompt in one line, without the lines of a chat template that only say whose turn it is."""
    lines = [line.strip() for line in prompt.splitlines()]
    return " ".join(line for line in lines if line and line not in TURNS) or prompt.strip()


def colour_scale(shown: Sequence[dict[str, Any]]) -> float:
    """KL of the fullest colour: a hundredth of the tokens lie above it in that run and step where it is highest."""
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for answer in shown:
        values[answer["run"], answer["step"]] += [value for value in answer["kl_forward"] if value is not None]
    return max([1e-3, *(sorted(found)[int(0.99 * (len(found) - 1))] for found in values.values() if found)])


def longest_shown(lengths: Sequence[int]) -> int:
    """Where answers are cut, so that all together are at most MAX_TOKENS: the short ones leave the long ones room."""
    room, left = MAX_TOKENS, len(lengths)
    for length in sorted(lengths):
        if length * left > room:
            return room // left
        room, left = room - length, left - 1
    return max(lengths, default=0)


def _page_answer(answer: Answer, prompt: int, table: TokenTable) -> dict[str, Any]:
    row = answer.row
    shown = {
        "run": answer.run,
        "step": answer.step,
        "prompt": prompt,
        "reward": row["reward"],
        "finish": row["finish_reason"],
        "length": answer.length,
        "mean": _rounded(fmean([value for value in answer.kl if _is_number(value)] or [0.0])),
        "tokens": [table.number(text) for text in row["tokens"]],
    }
    for name in SCALARS:
        shown[name] = [_rounded(value) for value in row[name]]
    for role in ROLES:
        shown[f"{role}_top"] = [[table.number(text) for text in texts] for texts in row[f"{role}_top_tokens"]]
        shown[f"{role}_p"] = [[_logp(value) for value in values] for values in row[f"{role}_top_logp"]]
    return shown


def worst_tokens(answers: Sequence[Answer], order: dict[int, int]) -> list[dict[str, Any]]:
    """The tokens of highest KL, of each run's first and last recorded step, among those that the page shows."""
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
                if _is_number(value)
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
        "student": [row["student_top_tokens"][position][0], round(row["student_top_logp"][position][0], 4)],
        "teacher": [row["teacher_top_tokens"][position][0], round(row["teacher_top_logp"][position][0], 4)],
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
            count: Counter[int] = Counter()
            for answer in of_run:
                if answer.step == step:
                    known = [position for position, value in enumerate(answer.kl) if _is_number(value)]
                    for position in known:
                        sums[position // width].append(answer.kl[position])
                    count.update({position // width for position in known})
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


def _is_number(value: float | None) -> bool:
    """Not so of a token that reaches no loss, nor where a model has lost its numbers."""
    return value is not None and math.isfinite(value)


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.3g}") if _is_number(value) else None


def _logp(value: float) -> float:
    return round(value, 2) if _is_number(value) else -100.0
