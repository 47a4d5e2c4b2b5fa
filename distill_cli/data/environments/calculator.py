"""A calculator: the student writes `<calc>47 + 85</calc>` at the end of a turn and reads `132`.

A turn that asks for nothing is the answer, and the verifier's to judge.
"""

from __future__ import annotations

import ast
import operator
import re

from distill_cli.data.environments import Observation
from distill_cli.types import Example

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
INSTRUCTION = "\nTo calculate, end with <calc>an expression</calc>, and read the result. Otherwise give the answer."
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_LENGTH = 200
"""Characters of an expression."""


class Calculator:
    def reset(self, example: Example) -> str:
        return example.question + INSTRUCTION

    def step(self, response: str) -> Observation:
        calls = CALL.findall(response)
        return Observation(calculate(calls[-1])) if calls else Observation(done=True)


def make() -> Calculator:
    return Calculator()


def calculate(expression: str) -> str:
    """The value of a sum, difference, product or quotient of numbers; `error: ...` of anything else."""
    if len(expression) > MAX_LENGTH:
        return f"error: longer than {MAX_LENGTH} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return f"{value:.10g}" if isinstance(value, float) else str(value)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return "error: not an expression of numbers, + - * / and brackets"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError
