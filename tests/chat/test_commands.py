"""What a line of a chat says."""

import pytest

from distill_cli.chat.commands import COMMANDS, SAY, Line, help_lines, parse
from distill_cli.chat.session import Session
from distill_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("What is 3 + 4?", Line(SAY, "What is 3 + 4?")),
        ("  indented", Line(SAY, "  indented")),
        ("//etc/hosts", Line(SAY, "/etc/hosts")),
        ("/kl", Line("kl", "")),
        ("/kl  ", Line("kl", "")),
        ("/system", Line("system", "")),
        ("/system You are brief. ", Line("system", "You are brief.")),
        ("/save a file.jsonl", Line("save", "a file.jsonl")),
        ("", None),
        (" \t", None),
    ],
)
def test_what_a_line_says(typed: str, line: Line | None) -> None:
    assert parse(typed) == line


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/sytem x", "/sytem: no such command; did you mean /system?"),
        ("/", "/: no such command (there are: /kl, /retry"),
        ("/KL", "/KL: no such command"),
        ("/reset now", "/reset now: takes nothing; leave it out"),
        ("/save", "/save: give FILE"),
    ],
)
def test_wrong_commands_are_refused(typed: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(typed)
    assert message in str(caught.value)


def test_every_command_is_done_and_explained() -> None:
    assert all(any(line.startswith(f"  /{name}") for line in help_lines()) for name in COMMANDS)
    assert {name for name in COMMANDS if not hasattr(Session, f"do_{name}")} == {"exit"}
