r"""Multiple choice: the letter that a response settles on, of A to J.

"The answer is (C)."   "Answer: C"   "\boxed{C}"   "C"
"""

import re

PATTERNS = (  # the first one that matches counts, and its last match
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}"),
    re.compile(r"(?i:answer|choice|option)(?:\s+is)?\s*:?\s*\**\s*\(?([A-J])\b"),
    re.compile(r"^\s*\(?([A-J])\)?[.:]?\s*$", re.MULTILINE),
)


def verify(response: str, answer: str) -> float:
    """Return 1.0 if the response's letter is the answer's (`C`, `(C)`, `c`)."""
    letter = re.sub(r"[^A-J]", "", answer.upper())
    return float(len(letter) == 1 and extract(response) == letter)


def extract(response: str) -> str | None:
    """Return the letter; None if the response settles on none."""
    return next((letters[-1] for pattern in PATTERNS if (letters := pattern.findall(response))), None)
