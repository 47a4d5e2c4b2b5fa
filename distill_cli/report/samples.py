"""The recorded answers in the form that the page shows.

The texts of all tokens are one table; an answer's tokens are indices into it. A page holds MAX_TOKENS tokens: longer
answers are cut, and the page says so.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from statistics import fmean
from typing import Any, TypeGuard

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from distill_cli.report.read import History

MAX_TOKENS = 35_000
"""Tokens of all answers of a page: what fits into 5 MB with the rest."""
NUM_WORST = 12
MAX_POSITIONS = 100
"""Points of a curve; neighbouring positions share one if there are more."""
ROW = ("prompt_index", "prompt", "finish_reason", "reward")
SCALARS = ("loss", "kl_forward", "kl_reverse", "entropy", "student_logp", "teacher_logp")
ROLES = ("student", "teacher")
BY_TOKEN = (*SCALARS, "tokens", *(f"{role}_top_{what}" for role in ROLES for what in ("tokens", "logp")))
TURNS = {"system", "user", "assistant", "model"}
"""What remains of a chat template's markers without special tokens."""


Answer = dict[str, Any]
"""A row of a rollouts file with its `run` and `step`. Columns by token are cut where the page cuts them, except `kl`:
KL forward of every token, None if a token has no loss."""


@dataclass(frozen=True)
class Samples:
    """What the page shows of the recorded answers."""

    shown: dict[str, Any] | None
    """The data of the disagreement view; None without answers."""
    positions: list[dict[str, Any]]
    """The `positions` dataset."""


def read_samples(histories: Sequence[History]) -> Samples:
    """Read the recorded answers of the runs of a page."""
    answers, unreadable = read_answers(histories)
    shown = page_samples(answers) | {"unreadable": unreadable} if answers else None
    return Samples(shown, list(position_rows(histories, answers)))


def read_answers(histories: Sequence[History]) -> tuple[list[Answer], list[str]]:
    """Read every recorded step of one run, the first and the last of each of several. Long answers are cut.

    Return the answers and the names of files that are damaged.
    """
    tables, unreadable = [], []
    for run, history in enumerate(histories):
        files = history.sample_files
        between = max(len(files) - 1, 1) if len(histories) > 1 else 1
        for step, file in files[::between]:
            try:
                with file.open("rb") as content:
                    table = pyarrow.parquet.read_table(content)
            except (OSError, pyarrow.ArrowException):
                unreadable.append(f"{history.name}/{file.name}")
                continue
            if {"kl_forward", *ROW, *BY_TOKEN} <= set(table.column_names):
                tables.append((run, step, table))
    lengths = [pyarrow.compute.list_value_length(table["kl_forward"]).to_pylist() for _, _, table in tables]
    limit = longest_shown([length for of_table in lengths for length in of_table])
    answers = [{"run": run, "step": step, **row} for run, step, table in tables for row in _cut(table, limit)]
    return answers, unreadable


def _cut(table: pyarrow.Table, limit: int) -> list[dict[str, Any]]:
    """Return the rows, with the first `limit` tokens of each column by token."""
    columns = {name: table[name] for name in ROW} | {"kl": table["kl_forward"]}
    columns |= {name: pyarrow.compute.list_slice(table[name], 0, max(limit, 1)) for name in BY_TOKEN}
    return pyarrow.table(columns).to_pylist()


def longest_shown(lengths: Sequence[int]) -> int:
    """Return the length to cut answers to, so that all together have at most MAX_TOKENS tokens."""
    room, left = MAX_TOKENS, len(lengths)
    for length in sorted(lengths):
        if length * left > room:
            return room // left
        room, left = room - length, left - 1
    return max(lengths, default=0)


def page_samples(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the data of the page's disagreement view."""
    prompts: dict[int, str] = {}
    for answer in answers:
        prompts.setdefault(answer["prompt_index"], answer["prompt"])
    places = {index: place for place, index in enumerate(prompts)}
    tokens: dict[str, int] = {}
    return {
        "prompts": [{"index": index, "text": text, "name": _one_line(text)} for index, text in prompts.items()],
        "answers": [_page_answer(answer, tokens) | {"prompt": places[answer["prompt_index"]]} for answer in answers],
        "tokens": list(tokens),
        "worst": [token | {"prompt": places[token["prompt"]]} for token in _worst_tokens(answers)],
        "cut": sum(len(answer["kl"]) - len(answer["tokens"]) for answer in answers),
        "scale": _colour_scale(answers),
    }


def _one_line(prompt: str) -> str:
    """Return a prompt in one line, without the lines of a chat template that only name a role."""
    lines = [line.strip() for line in prompt.splitlines()]
    return " ".join(line for line in lines if line and line not in TURNS) or prompt.strip()


def _colour_scale(answers: Sequence[Answer]) -> float:
    """Return the KL of the fullest colour: the highest 99th percentile of a run's step."""
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for answer in answers:
        values[answer["run"], answer["step"]] += [kl for kl in map(_rounded, answer["kl_forward"]) if kl is not None]
    return max([1e-3, *(sorted(kls)[int(0.99 * (len(kls) - 1))] for kls in values.values() if kls)])


def _page_answer(answer: Answer, tokens: dict[str, int]) -> dict[str, Any]:
    """Return an answer for the page; adds its texts to `tokens`, a text's index in the table."""

    def indices(texts: Sequence[str]) -> list[int]:
        return [tokens.setdefault(text, len(tokens)) for text in texts]

    shown = {
        **{name: answer[name] for name in ("run", "step", "reward")},
        "finish": answer["finish_reason"],
        "length": len(answer["kl"]),
        "mean": _rounded(fmean([kl for kl in answer["kl"] if _is_finite(kl)] or [0.0])),
        "tokens": indices(answer["tokens"]),
        **{name: [_rounded(value) for value in answer[name]] for name in SCALARS},
    }
    for role in ROLES:
        logps = answer[f"{role}_top_logp"]
        shown[f"{role}_top"] = [indices(texts) for texts in answer[f"{role}_top_tokens"]]
        shown[f"{role}_p"] = [[round(logp, 2) if _is_finite(logp) else -100.0 for logp in top] for top in logps]
    return shown


def _first_and_last(answers: Sequence[Answer]) -> Iterator[tuple[int, int, list[Answer]]]:
    """Yield run, step and answers of each run's first and last recorded step."""
    runs: dict[int, dict[int, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        runs[answer["run"]][answer["step"]].append(answer)
    for run, steps in sorted(runs.items()):
        for step in dict.fromkeys((min(steps), max(steps))):
            yield run, step, steps[step]


def _worst_tokens(answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the tokens of highest KL, of each run's first and last recorded step, that the page shows."""
    for run, step, of_step in _first_and_last(answers):
        kls = [(kl, at, row) for row in of_step for at, kl in enumerate(row["kl_forward"]) if _is_finite(kl)]
        for kl, at, row in nlargest(NUM_WORST, kls, key=lambda token: token[0]):
            likeliest = {role: (row[f"{role}_top_tokens"][at], row[f"{role}_top_logp"][at]) for role in ROLES}
            yield {
                **{"run": run, "step": step, "prompt": row["prompt_index"], "position": at, "kl": _rounded(kl)},
                "before": "".join(row["tokens"][max(0, at - 12) : at]),
                "token": row["tokens"][at],
                **{role: [texts[0], round(logps[0], 4)] for role, (texts, logps) in likeliest.items()},
            }


def position_rows(histories: Sequence[History], answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the `positions` dataset: mean KL forward by position, of each run's first and last recorded step."""
    for run, step, of_step in _first_and_last(answers):
        width = -(-max(len(answer["kl"]) for answer in answers if answer["run"] == run) // MAX_POSITIONS) or 1
        buckets: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for number, answer in enumerate(of_step):
            for position, kl in enumerate(answer["kl"]):
                if _is_finite(kl):
                    buckets[position // width].append((number, kl))
        for bucket, points in sorted(buckets.items()):
            yield {
                "run": histories[run].name,
                "when": f"step {step}" + (", before training" if step == 0 else ""),
                "position": bucket * width + (width - 1) / 2,
                "label": str(bucket) if width == 1 else f"{bucket * width} to {(bucket + 1) * width - 1}",
                "kl": _rounded(sum(kl for _, kl in points) / len(points)),
                "count": len({number for number, _ in points}),
            }


def _is_finite(value: float | None) -> TypeGuard[float]:
    """Return False for a token without loss, and for NaN and inf."""
    return value is not None and math.isfinite(value)


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.3g}") if _is_finite(value) else None
