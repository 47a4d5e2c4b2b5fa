"""Each verb's help fits one screen and shows examples that are commands."""

import shlex

import pytest

from distill_cli.cli import VERBS, run, split_verb
from distill_cli.config.compose import compose
from distill_cli.verbs import help
from distill_cli.verbs.plan import MEASURE

TEXTS = {"": help.GENERAL, **help.VERBS}


def examples(text: str) -> list[list[str]]:
    """The words of each example; what it does stands behind three spaces."""
    lines = text.split("examples\n")[1].split("\n\n")[0].splitlines()
    return [shlex.split(line.strip().split("   ")[0]) for line in lines]


def test_there_is_one_for_each_verb() -> None:
    assert help.VERBS.keys() == VERBS.keys()
    for verb in VERBS:
        assert f"distill {verb}" in help.GENERAL or f"[{verb}]" in help.GENERAL


@pytest.mark.parametrize("verb", TEXTS)
def test_it_fits_one_screen(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert run([verb, "--help"] if verb else ["--help"]) == 0
    assert capsys.readouterr().out == TEXTS[verb]
    lines = TEXTS[verb].splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("verb", TEXTS)
def test_its_examples_are_commands(verb: str) -> None:
    found = examples(TEXTS[verb])
    assert found
    for words in found:
        assert words[0] == "distill"
        if words[-1] == "...":
            continue
        named, rest = split_verb(words[1:])
        assert named == (verb or named)
        if named in ("train", "plan", "check"):
            compose([word for word in rest if word != MEASURE])
