"""A conversation at a terminal: read a line, do what it says, until the user leaves."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from distill_cli.chat import commands
from distill_cli.chat.commands import SAY, Line, parse
from distill_cli.chat.conversation import Conversation, save
from distill_cli.chat.rounds import Rounds
from distill_cli.errors import ConfigError
from distill_cli.terminal.console import Console
from distill_cli.terminal.printable import printable

BOLD_PROMPT = "\001\033[1m\002> \001\033[0m\002"
"""What stands between \\001 and \\002 takes no room on the line."""


@dataclass
class Session:
    """Reads lines, until /exit or Ctrl-D."""

    rounds: Rounds
    console: Console
    shows_kl: bool
    """Whether each answer is followed by its KL."""
    _question: str | None = None
    """The last message."""

    def run(self) -> int:
        """Return 0 when the user leaves."""
        prompt = "> "
        with suppress(ImportError):  # some builds of Python lack it: then lines cannot be edited
            import readline  # noqa: F401, `input` uses it from then on

            prompt = BOLD_PROMPT if self.console.color_system and not self.console.no_color else prompt
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while True:
            try:
                line = parse(input(prompt))
                if line is not None and line.command == "exit":
                    return 0
                if line is not None:
                    self.do(line)
            except EOFError:
                self.console.print()
                return 0
            except KeyboardInterrupt:
                self.say("\n(Ctrl-D or /exit leaves)")
            except ConfigError as error:
                self.say(f"error: {error}")

    def do(self, line: Line) -> None:
        """Do what a line says. Raises ConfigError if it cannot be done."""
        if line.command == SAY:
            self.ask(line.text)
        else:
            getattr(self, f"do_{line.command}")(line.text)

    def ask(self, question: str) -> None:
        answers = self.rounds.ask(question)
        self._question = question
        if self.shows_kl and answers:
            self.rounds.show_kl()

    def do_kl(self, _text: str) -> None:
        if not any(one.turns for one in self._conversations):
            raise ConfigError("/kl: nothing was answered yet; ask something first")
        self.rounds.show_kl()

    def do_retry(self, _text: str) -> None:
        if self._question is None:
            raise ConfigError("/retry: nothing was asked yet; ask something first")
        for one in self._conversations:
            if one.turns and one.turns[-1].question.example.question == self._question:
                one.turns.pop()
        self.ask(self._question)

    def do_reset(self, _text: str) -> None:
        for one in self._conversations:
            one.turns.clear()
        self._question = None
        self.say("a new conversation begins")

    def do_system(self, text: str) -> None:
        for one in self._conversations:
            one.system = text or None
        self.say(f"system prompt from the next answer on: {text or 'none'}")

    def do_save(self, text: str) -> None:
        rows = [row for one in self.rounds.speakers for row in one.conversation.rows(one.name)]
        save(Path(text), rows)
        self.say(f"saved {len(rows)} {'row' if len(rows) == 1 else 'rows'}: {text}")

    def do_help(self, _text: str) -> None:
        self.say("\n".join(commands.help_lines()))

    def say(self, text: str) -> None:
        """Print what no model says."""
        self.console.print(Text(printable(text), style="dim"))

    @property
    def _conversations(self) -> list[Conversation]:
        return [one.conversation for one in self.rounds.speakers]
