r"""Multiple choice: the letter that a response settles on, of A to J.

"The answer is (C)."   "Answer: C"   "\boxed{C}"   "C"
"""

from __future__ import annotations

import re

SAID = (  # the first kind that is there counts, and of it the last
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}"),
    re.compile(r"(?i:answer|choice|option)(?:\s+is)?\s*:?\s*\**\s*\(?([A-J])\b"),
    re.compile(r"^\s*\(?([A-J])\)?[.:]?\s*$", re.MULTILINE),
)


def verify(response: str, answer: str) -> float:
    """1.0 if the response's letter is the answer's (`C`, `(C)`, `c`)."""
    letter = re.sub(r"[^A-J]", "", answer.upper())
    return float(len(letter) == 1 and extract(response) == letter)


def extract(response: str) -> str | None:
    """The letter; None where the response settles on none."""
    found = next((letters for pattern in SAID if (letters := pattern.findall(response))), None)
    return found[-1] if found else None
