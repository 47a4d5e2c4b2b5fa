"""One declaration a verb: its help shows every flag and fits one screen, its examples are commands."""

import argparse
import inspect
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.cli import run, split_verb
from distill_cli.config.compose import compose
from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import VERBS, is_override, module_of, parser_of, text

NOT_VERBS = {"__init__", "command_line"}


def parsed(line: str) -> argparse.Namespace:
    verb, words = split_verb(shlex.split(line))
    return parser_of(verb).parse(words)


def help_of(verb: str | None, capsys: pytest.CaptureFixture[str]) -> str:
    assert run([verb, "--help"] if verb else ["--help"]) == 0
    return capsys.readouterr().out


def test_every_file_declares_a_verb() -> None:
    files = {file.stem for file in Path(inspect.getfile(parser_of)).parent.glob("*.py")}
    assert files - NOT_VERBS == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_docstring_is_the_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.cleandoc(module_of(verb).__doc__) == text(verb).strip()
    assert text(verb).splitlines()[0] in help_of(verb, capsys)
    assert text(verb).splitlines()[0] in help_of(None, capsys)


def test_help_imports_no_libraries() -> None:
    """`distill VERB --help` and Tab answer without what does the work."""
    names = "{'hydra', 'omegaconf', 'rich', 'yaml', 'pyarrow', 'psutil', 'torch', 'vllm'}"
    code = f"""if True:
        import sys
        from distill_cli import cli
        from distill_cli.verbs.command_line import VERBS, parser_of
        for verb in VERBS:
            parser_of(verb).format_help()
        sys.exit(', '.join({names} & set(sys.modules)) or 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_the_help_fits_one_screen(
    verb: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(verb, capsys).splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_shows_every_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = parser_of(verb).flags()
    assert flags
    shown = help_of(verb, capsys).replace(",", " ").split()
    assert flags.keys() <= set(shown)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_examples_are_commands(verb: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(verb, capsys).split("\nexamples\n")[1].split("\n\n")[0].splitlines()
    examples = [shlex.split(line.strip().split("   ")[0]) for line in lines]
    assert examples
    for command, *words in examples:
        assert command == "distill"
        if words[-1:] == ["..."]:
            continue
        named, rest = split_verb(words)
        assert named == (verb or named)
        arguments = parser_of(named).parse(rest)
        if named in ("train", "plan", "check"):
            compose(arguments.overrides, arguments.flags)


@pytest.mark.parametrize(
    "line",
    [
        "resume runs/x --step 3 mesh.tensor=2 eval.period=1",
        "resume runs/x mesh.tensor=2 eval.period=1 --step 3",
        "resume --step=3 runs/x mesh.tensor=2 eval.period=1",
        "resume mesh.tensor=2 --step 3 runs/x eval.period=1",
    ],
)
def test_flags_and_overrides_stand_anywhere(line: str) -> None:
    arguments = parsed(line)
    assert (arguments.subject, arguments.step) == ("runs/x", "3")
    assert arguments.overrides == ["mesh.tensor=2", "eval.period=1"]


def test_wait_is_an_override() -> None:
    for line in ("train --wait loss=reverse", "loss=reverse --wait", "resume --wait runs/x loss=reverse"):
        assert parsed(line).overrides == ["loss=reverse", "cluster.wait=true"]
    assert parsed("loss=reverse").overrides == ["loss=reverse"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("loss=reverse", True),
        ("+a.b=1", True),
        ("~a", True),
        ("data.train.path=/a/b", True),
        ("hydra/sweeper=optuna", True),
        ("here=1", False),
        ("loss/token_weight=position", True),
        ("runs/s/0_topk=32", False),
        ("/runs/s/0_topk=32", False),
        ("Qwen/Qwen3-4B", False),
    ],
)
def test_folders_are_no_overrides(word: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here=1").mkdir()
    assert is_override(word) == expected


def test_each_unknown_flag_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        parsed("resume --stp 3 --wait=1 --foo")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["--stp", "--foo"]
