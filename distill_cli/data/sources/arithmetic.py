"""Generated arithmetic with worked steps: two additions or subtractions of two-digit numbers, from left to right.

    What is 47 + 85 - 16?

    47 + 85 = 132
    132 - 16 = 116
    #### 116

No step goes below zero. A hash of the question's text decides which split it belongs to, so no two splits can share
one, whatever their sizes and seeds.
"""

import hashlib
import random

from distill_cli.errors import ConfigError
from distill_cli.types import Example

SPLITS = {"validation": range(10), "train": range(10, 40), "pair": range(40, 100)}
"""The hundredths of all questions that a split has. The tiny pair itself was trained on `pair`."""
MAX_SIZE = 100_000
"""Most rows of a split: about half of the smallest split, so that drawing stays quick."""


def load(*, split: str, size: int, seed: int, operators: str = "+-", context_key: str | None = None) -> list[Example]:
    """Return `size` different problems of a split, the same on every machine; a smaller size gives the first ones.

    Args:
        operators: those that problems have: `+`, `-` or `+-`.
        context_key: `solution` shows the worked steps to the teacher only; `data.teacher_context` sets it.

    Raises:
        ConfigError: no such split, or too few problems in it.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split}: must be one of {', '.join(SPLITS)}")
    if not 1 <= size <= MAX_SIZE:
        raise ConfigError(f"size={size}: must be between 1 and {MAX_SIZE}")
    if operators not in ("+-", "+", "-"):
        raise ConfigError(f"operators={operators}: must be +, - or +-")
    if context_key not in (None, "solution"):
        raise ConfigError(f"context_key={context_key}: must be solution or null")
    rng, examples = random.Random(f"{split}-{seed}"), dict[str, Example]()
    while len(examples) < size:
        question = _draw_question(rng, operators)
        if question is not None and _hundredth(question) in SPLITS[split]:
            solution = worked_solution(question)
            context, answer = solution if context_key else None, solution.rsplit(" ", 1)[1]
            examples[question] = Example(question, answer, context=context, response=solution)
    return list(examples.values())


def _hundredth(question: str) -> int:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % 100


def worked_solution(question: str) -> str:
    """Return one line a step, and the line with the final answer."""
    first, *rest = question.removeprefix("What is ").removesuffix("?").split()
    value, lines = int(first), []
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(operand) if operator == "+" else value - int(operand)
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def _draw_question(rng: random.Random, operators: str) -> str | None:
    """Draw a question; None if one of its steps goes below zero."""
    a, b, c = (rng.randrange(10, 100) for _ in range(3))
    first, second = rng.choice(operators), rng.choice(operators)
    partial = a + b if first == "+" else a - b
    if partial < 0 or (second == "-" and partial < c):
        return None
    return f"What is {a} {first} {b} {second} {c}?"
