import random
import subprocess
import sys
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distill_cli.data.registry import load_examples
from distill_cli.data.sources.arithmetic import MAX_SIZE, SPLITS, load, worked_solution
from distill_cli.data.verifiers.exact import verify
from distill_cli.errors import ConfigError

PROBLEMS = {split: load(split=split, size=3000, seed=0) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_reproducible_without_duplicates(split: str) -> None:
    problems = PROBLEMS[split]
    assert len({problem.question for problem in problems}) == len(problems) == 3000
    assert load(split=split, size=3000, seed=0) == problems
    assert load(split=split, size=100, seed=0) == problems[:100], "fewer are the first of more"
    assert load(split=split, size=100, seed=1) != problems[:100]


def test_problems_are_known_constants() -> None:
    assert [(p.question, p.answer) for p in load(split="validation", size=2, seed=0)] == [
        ("What is 34 + 39 - 56?", "17"),
        ("What is 74 + 58 - 17?", "115"),
    ]


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_splits_share_no_question(one: str, other: str) -> None:
    questions = {
        split: {p.question for seed in range(3) for p in load(split=split, size=3000, seed=seed)}
        for split in (one, other)
    }
    assert not questions[one] & questions[other]


def test_every_hash_belongs_to_one_split() -> None:
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(100))


@pytest.mark.parametrize("problem", PROBLEMS["train"][::10], ids=lambda problem: problem.question)
def test_worked_solutions_are_right(problem) -> None:
    expression = problem.question.removeprefix("What is ").removesuffix("?")
    *steps, last = worked_solution(problem.question).splitlines()
    assert len(steps) == 2
    for step in steps:
        left, right = step.split(" = ")
        assert eval(left) == int(right) >= 0
    assert steps[0].startswith(expression[:7])
    assert steps[1].startswith(steps[0].split(" = ")[1] + expression[7:])
    assert last == f"#### {eval(expression)}" == f"#### {problem.answer}"


def test_the_shipped_key_names_load() -> None:
    spec = {"source": "arithmetic", "split": "validation", "size": 10, "seed": 0}
    assert load_examples(spec, key="data.validation") == PROBLEMS["validation"][:10]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "test"}, "split=test: must be one of validation, train, pair"),
        ({"size": 0}, f"size=0: must be between 1 and {MAX_SIZE}"),
        ({"size": MAX_SIZE + 1}, f"size={MAX_SIZE + 1}: must be between 1 and {MAX_SIZE}"),
    ],
)
def test_impossible_draws_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**{"split": "train", "size": 1, "seed": 0} | keys)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("47 + 85 = 132\n132 - 16 = 116\n#### 116", "116", 1.0),
        ("#### 116\n", "116", 1.0),
        ("####116", "116", 1.0),
        ("  ####  116  \r\n", "116", 1.0),
        ("#### 1,160", "1160", 1.0),
        ("#### 1160", "1,160", 1.0),
        ("#### 1 160.0", "1160", 1.0),
        ("#### -7", "-7.00", 1.0),
        ("#### 0.5", ".5", 1.0),
        ("#### north", "north", 1.0),
        ("#### 3\n#### 116", "116", 1.0),
        ("#### 116\n#### 3", "116", 0.0),
        ("#### 116\n####", "116", 0.0),
        ("116", "116", 0.0),
        ("the answer is #### 116", "116", 0.0),
        ("#### 1160", "116", 0.0),
        ("#### 116 apples", "116", 0.0),
        ("#### 116#### 116", "116", 0.0),
        ("#### NaN", "116", 0.0),
        ("#### ١١٦", "116", 0.0),
        ("", "116", 0.0),
    ],
)
def test_verifier_reads_the_last_final_answer(response: str, answer: str, reward: float) -> None:
    assert verify(response, answer) == reward


@given(st.text(), st.text())
@example("#### sNaN", "sNaN")
@example("#### ²", "²")
@example("#### 1e999999999", "1")
@example("#### " + "9" * 10_000, "1")
@example("#### \ud800", "\x00")
def test_verifier_never_raises(text: str, answer: str) -> None:
    assert verify(text, answer) in (0.0, 1.0)
    assert verify(f"#### {text}", answer) in (0.0, 1.0)


@given(st.integers(-(10**9), 10**9))
def test_any_notation_of_numbers_is_read(number: int) -> None:
    for written in (f"{number}", f"{number:,}", f"{number}.0"):
        assert verify(f"{random.Random(0).random()}\n#### {written}\n", str(number)) == 1.0
    assert verify(f"#### {number + 1}", str(number)) == 0.0


def test_the_data_imports_no_torch() -> None:
    code = (
        "import sys, distill_cli.data.sources.arithmetic, distill_cli.data.verifiers.exact; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
