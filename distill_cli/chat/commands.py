"""The lines that a user types: messages to the models, and commands, which begin with a slash."""

from dataclasses import dataclass

from distill_cli.config.choices import nearest
from distill_cli.errors import ConfigError

SAY = "say"
"""`Line.command` of a message to the models."""


@dataclass(frozen=True)
class Command:
    """A command and its argument."""

    argument: str
    """As shown in the help; in brackets if it may be left out, empty if there is none."""
    help: str


COMMANDS = {
    "kl": Command("", "the last answer token by token, by its KL from the teacher"),
    "retry": Command("", "answer the last message again, with another seed"),
    "reset": Command("", "begin a new conversation"),
    "system": Command("[TEXT]", "set the system prompt from the next answer on; without TEXT there is none"),
    "save": Command("FILE", "write the conversation as JSON lines, which are data to train on"),
    "help": Command("", "this list"),
    "exit": Command("", "leave; Ctrl-D does too"),
}


@dataclass(frozen=True)
class Line:
    """What was typed."""

    command: str
    """A name of COMMANDS, or SAY."""
    text: str
    """The argument, or the message."""


def parse(line: str) -> Line | None:
    """Return what was typed; None if it is blank. A second slash begins a message: `//x` says `/x`.

    Raises:
        ConfigError: there is no such command, or its argument is missing or one too many.
    """
    if not line.strip():
        return None
    if not line.startswith("/"):
        return Line(SAY, line)
    if line.startswith("//"):
        return Line(SAY, line[1:])
    name, _, rest = line[1:].strip().partition(" ")
    text = rest.strip()
    if (command := COMMANDS.get(name)) is None:
        known = ", ".join(f"/{one}" for one in COMMANDS)
        near = nearest(name, COMMANDS).replace("mean ", "mean /")
        raise ConfigError(f"/{name}: no such command{near} (there are: {known}; // begins a message with a slash)")
    if text and not command.argument:
        raise ConfigError(f"/{name} {text}: takes nothing; leave it out")
    if not text and command.argument and not command.argument.startswith("["):
        raise ConfigError(f"/{name}: give {command.argument}")
    return Line(name, text)


def help_lines() -> list[str]:
    """Return the commands, one a line."""
    shown = {f"/{name} {command.argument}".strip(): command.help for name, command in COMMANDS.items()}
    return [
        *(f"  {name:<14} {text}" for name, text in shown.items()),
        f"  {'Ctrl-C':<14} stop an answer; what is written of it stays in the conversation",
        f"  {'//...':<14} a message that begins with a slash",
    ]
