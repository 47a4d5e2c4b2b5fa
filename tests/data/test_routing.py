"""Whose a row is: columns, weights, sources' names."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill_cli.data.order import PromptOrder
from distill_cli.data.prompts import PromptMaker, PromptSettings, TeacherPromptSettings
from distill_cli.data.registry import load_examples
from distill_cli.data.routing import route
from distill_cli.data.rows import Columns
from distill_cli.errors import ConfigError
from distill_cli.models.model_files import ASSETS
from distill_cli.types import Example, Target

NAMES = ("math", "code")


def row(whose: object) -> Example:
    return Columns("question", teacher_key="whose").to_example({"question": "?", "whose": whose}, where="here")


@pytest.mark.parametrize(
    ("whose", "expected"),
    [
        ("code", {1: 1.0}),
        (["math", "code"], {0: 0.5, 1: 0.5}),
        ({"math": 3, "code": 1}, {0: 0.75, 1: 0.25}),
        ({"math": None, "code": 2.0}, {1: 1.0}),
        ("art", {}),
        (["math", "art"], {}),
    ],
)
def test_rows_name_teachers_and_weights(whose: object, expected: dict[int, float]) -> None:
    assert route(row(whose), NAMES) == expected


@pytest.mark.parametrize("whose", [5, [1], {"math": -1}, {"math": "much"}, {"math": 0}, {"math": float("nan")}, True])
def test_other_values_are_refused(whose: object) -> None:
    with pytest.raises(ConfigError, match="here: whose must be a name, a list of names, or an object"):
        row(whose)


def test_rows_without_a_name_go_by_dataset() -> None:
    assert route(Example("?", dataset="code"), NAMES) == {1: 1.0}
    assert route(Example("?", dataset="art"), NAMES) == {}
    assert route(Example("?", dataset="art"), ("teacher",)) == {0: 1.0}
    assert row(None).teachers == row([]).teachers == row("").teachers == ()


def test_column_reaches_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "?", "answer": "1", "whose": "code"}) + "\n")
    file = {"path": str(tmp_path / "a.jsonl")}
    spec = {"source": "mix", "sources": {"a": {"source": "jsonl", **file}, "b": {"source": "table", **file}}}
    assert [one.teachers for one in load_examples(spec, key="data.train", teacher="whose")] == [(("code", 1.0),)] * 2
    with pytest.raises(ConfigError, match="no column 'who'"):
        load_examples(spec, key="data.train", teacher="who")


def test_prompts_have_their_teachers_readings() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")
    own = TeacherPromptSettings("code", chat_template="C:{{ messages[0].content }}")
    settings = PromptSettings(40, teachers=(TeacherPromptSettings("math"), own))
    make = PromptMaker(tokenizer, settings)
    ids = tokenizer.encode("C:1?", add_special_tokens=False)
    mixed = make(Example("1?", teachers=(("code", 0.75), ("math", 0.25))), 0)
    assert mixed.targets == (Target(0, 0.25), Target(1, 0.75, ids))
    assert (mixed.teachers, mixed.main_target.teacher) == (3, 1)
    assert make(Example("1?", dataset="math"), 1).targets == (Target(0),)
    assert make(Example("1?", dataset="art"), 2) is None
    assert "1 of 3 prompts ask for no known teacher (math, code)" in make.warnings()[0]
    anyone = PromptMaker(tokenizer, settings, is_scored=False)(Example("1?"), 0)
    assert anyone.targets == (Target(0, 0.5), Target(1, 0.5, ids))


def test_other_teachers_change_the_fingerprint() -> None:
    def fingerprint(*targets: Target) -> str:
        prompts = [PromptMakerless(targets) for _ in range(2)]
        return PromptOrder(prompts, batch_size=1, seed=0, shuffle=False).fingerprint

    class PromptMakerless:
        def __init__(self, targets: tuple[Target, ...]) -> None:
            self.token_ids, self.targets = [1, 2], targets

    found = {fingerprint(*targets) for targets in ([Target()], [Target(1)], [Target(0, 0.5), Target(1, 0.5)])}
    assert len(found) == 3
