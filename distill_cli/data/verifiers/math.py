r"""Mathematical answers through the math-verify library: \boxed{}, fractions, intervals, sets, units, equations.

"... so the area is \boxed{\frac{1}{2}}"  equals  0.5
"""

import logging

from distill_cli.data.rows import boxed_answer

NUM_CHARACTERS = 2000
"""Characters of a response's end, and of an answer, that are parsed: parsing takes long on more."""


def verify(response: str, answer: str) -> float:
    r"""Return 1.0 if the response's final answer (last \boxed{}, else last formula or number) equals the answer.

    `distill_cli.data.isolated` limits the time, so the library's own alarms are off.
    """
    from math_verify import verify as equal

    end = response[-NUM_CHARACTERS:]
    boxed = extract(end)  # else the library would read neighbouring boxes as one answer
    parsed = _parse(end if boxed is None else f"\\boxed{{{boxed}}}")
    gold = _parse(f"\\boxed{{{answer[:NUM_CHARACTERS]}}}")
    return float(bool(gold and parsed) and equal(gold, parsed, timeout_seconds=None))


def extract(response: str) -> str | None:
    r"""Return what the last \boxed{} holds, so that answers can be counted; None if there is none."""
    return boxed_answer(response)


def _parse(text: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn that their alarms are off
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, extraction_config=kinds, parsing_timeout=None)
