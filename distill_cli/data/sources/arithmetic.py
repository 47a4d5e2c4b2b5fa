"""Generated arithmetic with worked steps: two additions or subtractions of two-digit numbers, from left to right.

    What is 47 + 85 - 16?

    47 + 85 = 132
    132 - 16 = 116
    #### 116

No step goes below zero. A hash of the question's text decides which split it belongs to, so no two splits can share
one, whatever their sizes and seeds.
"""

from __future__ import annotations

import hashlib
import random

from distill_cli.errors import ConfigError
from distill_cli.types import Example

SPLITS = {"validation": range(10), "train": range(10, 40), "pair": range(40, 100)}
"""Which hundredths of all questions a split takes. `pair` is what the tiny pair itself was trained on."""
MAX_SIZE = 100_000
"""Rows a split can be asked for: about half of what the smallest one holds, so that drawing them stays quick."""


def load(*, split: str, size: int, seed: int, context_key: str | None = None) -> list[Example]:
    """`size` different problems of a split, the same ones on every machine; fewer are the first of more.

    Args:
        context_key: `solution` shows the worked steps to the teacher alone; `data.teacher_context` sets it.

    Raises:
        ConfigError: there is no such split, or not so many problems in it.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split}: must be one of {', '.join(SPLITS)}")
    if not 1 <= size <= MAX_SIZE:
        raise ConfigError(f"size={size}: must be between 1 and {MAX_SIZE}")
    if context_key not in (None, "solution"):
        raise ConfigError(f"context_key={context_key}: there is only solution")
    rng = random.Random(f"{split}-{seed}")
    questions: dict[str, None] = {}
    while len(questions) < size:
        question = _draw_question(rng)
        if question is not None and _hundredth(question) in SPLITS[split]:
            questions[question] = None
    examples = []
    for question in questions:
        solution = worked_solution(question)
        context = solution if context_key else None
        answer = solution.rsplit(" ", 1)[1]
        examples.append(Example(question=question, answer=answer, context=context, response=solution))
    return examples


def split_of(question: str) -> str:
    """The one split that a question belongs to."""
    return next(split for split, hundredths in SPLITS.items() if _hundredth(question) in hundredths)


def _hundredth(question: str) -> int:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % 100


def worked_solution(question: str) -> str:
    """One line a step, and the line with the final answer."""
    first, *rest = question.removeprefix("What is ").removesuffix("?").split()
    value, lines = int(first), []
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(operand) if operator == "+" else value - int(operand)
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def _draw_question(rng: random.Random) -> str | None:
    """A question, or None where a step of what was drawn goes below zero."""
    a, b, c = (rng.randrange(10, 100) for _ in range(3))
    first, second = rng.choice("+-"), rng.choice("+-")
    partial = a + b if first == "+" else a - b
    if partial < 0 or (second == "-" and partial < c):
        return None
    return f"What is {a} {first} {b} {second} {c}?"
