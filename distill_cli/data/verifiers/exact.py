"""The last final-answer line, compared as a number.

47 + 85 = 132
132 - 16 = 116
#### 116
"""

import re
from decimal import Decimal

FINAL_ANSWER = re.compile(r"^[^\S\n]*####([^\n]*)$", re.MULTILINE)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)


def verify(response_text: str, answer: str) -> float:
    """Return 1.0 if the last `#### x` line holds the answer, else 0.0; never raises.

    Commas and whitespace do not count, and numbers are compared by value: `#### 1,160.0` equals 1160. Anything else is
    compared as text.
    """
    final_answers = FINAL_ANSWER.findall(response_text)
    return float(bool(final_answers) and _value(final_answers[-1]) == _value(answer))


def extract(response_text: str) -> str | None:
    """Return the final answer, written alike for answers that `verify` counts as equal; None if there is none."""
    final_answers = FINAL_ANSWER.findall(response_text)
    value = _value(final_answers[-1]) if final_answers else None
    return format(value.normalize(), "f") if isinstance(value, Decimal) else value


def _value(text: str) -> Decimal | str:
    bare = "".join(text.split()).replace(",", "")
    return Decimal(bare) if NUMBER.fullmatch(bare) else bare
