"""The row's answer is a regular expression, which the response must match somewhere: `(?i)paris|île-de-france`."""

import re


def verify(response: str, answer: str) -> float:
    """Return 1.0 if the expression matches. Raises re.error if it is not an expression."""
    return float(re.search(answer, response, re.MULTILINE) is not None)
