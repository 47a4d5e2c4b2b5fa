"""A calculator: the student writes `<calc>47 + 85</calc>` at the end of a turn and reads `132`.

A turn without a call is the answer, which the verifier judges.
"""

import ast
import operator
import re

from distill_cli.data.environments import Observation
from distill_cli.types import Example

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
INSTRUCTION = "\nTo calculate, end with <calc>an expression</calc>, and read the result. Otherwise give the answer."
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_LENGTH = 200
"""Most characters of an expression."""


class Calculator:
    """One sequence's calculator; it has no state."""

    def reset(self, example: Example) -> str:
        return example.question + INSTRUCTION

    def step(self, response: str) -> Observation:
        calls = CALL.findall(response)
        return Observation(calculate(calls[-1])) if calls else Observation(done=True)


make = Calculator


def calculate(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / and brackets, or `error: ...`."""
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
    match node:
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
            return OPERATORS[type(operation)](_value(left), _value(right))
    raise ValueError
