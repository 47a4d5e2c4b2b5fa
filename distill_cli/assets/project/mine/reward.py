"""How good an answer is. It runs in a process of its own: an answer on which it hangs or raises scores 0."""

import re


def extract(response: str) -> str | None:
    """Return the final answer, which follows the last ####; None if there is none."""
    found = re.findall(r"####\s*(-?\d+)", response)
    return found[-1] if found else None


def verify(response: str, answer: str) -> float:
    """Return 1 for the right answer, a tenth for a wrong one in the right form, and 0 for anything else."""
    final = extract(response)
    if final is None:
        return 0.0
    return 1.0 if final == answer.strip() else 0.1
