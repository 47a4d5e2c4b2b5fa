"""Verifiers by hand-made answers, and what becomes of one that hangs, raises, dies or prints."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.data.registry import resolve_extract, resolve_verifier

MATH = [  # response, answer, whether it is right
    (r"so \boxed{\frac{1}{2}}", "0.5", True),
    (r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
    (r"first \boxed{3}, no: \boxed{4}", "4", True),
    (r"first \boxed{3}, no: \boxed{4}", "3", False),
    ("The answer is 1,234.", "1234", True),
    (r"It takes $12\text{ cm}$.", "12", True),
    (r"\boxed{(0, 1]}", "(0,1]", True),
    (r"\boxed{[0, 1]}", "(0,1]", False),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
    (r"\boxed{7}", "8", False),
    ("I do not know.", "8", False),
    ("", "", False),
    (r"\boxed{", r"\frac{", False),
]


@pytest.fixture(scope="module")
def math():
    verify = IsolatedVerifier("math")
    yield verify
    verify.close()


@pytest.mark.parametrize(("response", "answer", "right"), MATH)
def test_mathematical_answers(math: IsolatedVerifier, response: str, answer: str, right: bool) -> None:
    assert math([(response, answer)]) == [float(right)]
    assert math.failures.num_all == 0


def test_slow_answer_scores_zero_alone() -> None:
    math = IsolatedVerifier("math", limit_s=0.5)
    assert math([(r"\boxed{9^{9^{9^{9}}}}", "3"), (r"\boxed{3}", "3")]) == [0, 1]
    assert math.failures.num_all == 1
    math.close()


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is (C).", "C", True),
        ("A or B? Answer: **B**", "(b)", True),
        (r"It is \boxed{\text{D}}", "D", True),
        ("C", "C", True),
        ("A\nB", "A", False),
        ("A cat has nine lives.", "A", False),
        ("The answer is (C).", "CD", False),
    ],
)
def test_letters(response: str, answer: str, right: bool) -> None:
    assert resolve_verifier("choice")(response, answer) == float(right)


def test_expressions() -> None:
    assert resolve_verifier("regex")("It is Paris.", r"(?i)\bparis\b") == 1
    assert resolve_verifier("regex")("It is Parisian.", r"(?i)\bparis\b") == 0


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedVerifier]:
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "def verify(response, answer):\n"
        "    print('noise')\n"
        "    if response == 'raise': raise ValueError('no')\n"
        "    if response == 'exit': os._exit(3)\n"
        "    if response == 'sleep': time.sleep(60)\n"
        "    while response == 'deaf':\n"
        "        try: time.sleep(60)\n"
        "        except BaseException: pass\n"
        "    if response == 'text': return 'right'\n"
        "    if response == 'count': return len(answer)\n"
        "    return response == answer\n"
        "def extract(response): return response\n"
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mine", None)
    verify = IsolatedVerifier("mine:verify", limit_s=0.3)
    yield verify
    verify.close()


FAILING = ["raise", "exit", "sleep", "deaf", "text"]


def test_user_verifier_may_fail_any_way(mine: IsolatedVerifier) -> None:
    begin = time.monotonic()
    for number, response in enumerate(FAILING, start=1):
        assert mine([(response, "a")]) == [0]
        assert mine.failures.num_all == number
        assert mine([("a", "a")]) == [1]
    assert time.monotonic() - begin < 60
    assert resolve_extract(mine.function)("b") == "b"


def test_failures_among_many_cost_themselves(mine: IsolatedVerifier) -> None:
    """More answers than a process is given at once, each with a score of its own; some larger than a pipe."""
    lengths = [1_000_000 if place % 100 == 50 else place + 1 for place in range(300)]
    pairs = [("count", "a" * length) for length in lengths]
    places = [0, 1, 70, 100, 299]
    for place, response in zip(places, FAILING, strict=True):
        pairs[place], lengths[place] = (response, "a"), 0
    assert mine(pairs) == lengths
    assert mine.failures.take() == len(FAILING)
    assert mine._worker.num_ends == 2  # `exit` and `deaf` took the process with them
    assert mine([]) == []


def test_answers_before_a_crash_count(mine: IsolatedVerifier) -> None:
    for _ in range(5):
        assert mine([("a", "a")] * 30 + [("exit", "a")] * 2 + [("a", "a")]) == [1] * 30 + [0, 0, 1]


def test_unread_answers_are_discarded(mine: IsolatedVerifier) -> None:
    with pytest.raises(TypeError, match="serializable"):
        mine([("count", "aa")] * 90 + [("count", {"a"})])
    assert mine([("count", "aaa")]) == [3]


def test_extract_is_found_by_verifier() -> None:
    assert resolve_extract(resolve_verifier("math"))(r"\boxed{7}") == "7"
    assert resolve_extract(resolve_verifier("regex")) is None
