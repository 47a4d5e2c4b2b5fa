"""One message to all models of a chat: their answers as they are written, and the KL of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from rich.text import Text

from distill_cli.chat import kl_view
from distill_cli.chat.answers import Answer, Speaker, write
from distill_cli.chat.conversation import Turn
from distill_cli.chat.screen import Columns, fits_columns
from distill_cli.chat.token_kl import AnswerKl, KlMeter
from distill_cli.errors import ConfigError, DistillError
from distill_cli.terminal.console import Console
from distill_cli.terminal.printable import printable

SEED_STEP = 1_000_003
"""Between the first seeds of two chats."""
OnText = Callable[[Answer, str], object]
Interrupts = Callable[[], AbstractContextManager[Callable[[], bool]]]


@dataclass
class Rounds:
    """Lets the models of a chat answer, and shows it. What fails is printed, and the chat goes on."""

    runner: asyncio.Runner
    speakers: Sequence[Speaker]
    meter: KlMeter
    console: Console
    """For answers."""
    errors: Console
    """For everything else."""
    seed: int
    interrupts: Interrupts
    """Returns a context that yields whether Ctrl-C asked the answers to stop."""
    num_failed: int = field(default=0, init=False)
    """Answers and comparisons that failed."""
    _number: int = field(default=0, init=False)

    def ask(self, question: str) -> list[Answer]:
        """Let all models answer, and show it as it is written: in columns, or one after the other."""
        self._number += 1
        if len(self.speakers) > 1 and fits_columns(self.console):
            answers = [answer for speaker in self.speakers for answer in self._begin(speaker, question)]
            if not answers:
                return []
            with Columns(self.console, answers):
                return self._write(answers, lambda *_: None)
        return [answer for speaker in self.speakers for answer in self._ask_one(speaker, question)]

    def ask_silently(self, question: str) -> list[Answer]:
        """Let all models answer at the same time."""
        self._number += 1
        answers = [answer for speaker in self.speakers for answer in self._begin(speaker, question)]
        return self._write(answers, lambda *_: None)

    def _ask_one(self, speaker: Speaker, question: str) -> list[Answer]:
        answers = self._begin(speaker, question)
        if answers and len(self.speakers) > 1:
            self.console.print(Text(speaker.name, style="bold"))
        done = self._write(answers, self._print_part)
        for answer in answers:
            if not answer.text.endswith("\n"):
                self.console.print()
            if answer.remark:
                self.errors.print(Text(answer.remark, style="dim"))
        return done

    def _begin(self, speaker: Speaker, question: str) -> list[Answer]:
        """Return the answer, as it begins; nothing if it cannot. All models have the same seed."""
        with self.going_on(speaker):
            return [Answer(speaker, question, self.seed * SEED_STEP + self._number)]
        return []

    def _write(self, answers: Sequence[Answer], on_text: OnText) -> list[Answer]:
        """Write answers to their end, or until Ctrl-C, and return those that did not fail."""
        with self.interrupts() as is_interrupted, self.going_on(*(answer.speaker for answer in answers)):
            write(self.runner, answers, on_text=on_text, should_stop=is_interrupted)
        done = [answer for answer in answers if answer.ended is not None]
        for answer in done:
            answer.keep()
        return done

    def _print_part(self, _answer: Answer, text: str) -> None:
        self.console.file.write(printable(text))
        self.console.file.flush()

    def measure(self, speaker: Speaker, turn: Turn) -> AnswerKl | None:
        """Return an answer compared with the teacher; None if it cannot be."""
        with self.going_on(speaker):
            if self.meter.is_ready:
                return self.meter.measure(speaker, turn)
            with self.errors.status("starting the teacher"):
                return self.meter.measure(speaker, turn)
        return None

    def show_kl(self) -> None:
        """Show the last answer of each model that can be compared with the teacher."""
        found = []
        for speaker in self.speakers:
            if (turns := speaker.conversation.turns) and speaker.model.role == "student":
                measured = self.measure(speaker, turns[-1])
                found += [] if measured is None else [(speaker, measured)]
        scale = kl_view.colour_scale([measured for _, measured in found])
        for speaker, measured in found:
            if len(self.speakers) > 1:
                self.console.print(Text(speaker.name, style="bold"))
            self.console.print(kl_view.coloured(measured, scale))
            self.console.print(kl_view.highest(measured))
            self.console.print(Text(kl_view.summary(measured.views)))
        if found:
            of = kl_view.describe(self.meter.pair(found[0][0]))
            for line in (*of, f"the fullest colour is {scale:.2g} nats and more"):
                self.console.print(Text(line, style="dim"))

    @contextmanager
    def going_on(self, *speakers: Speaker) -> Iterator[None]:
        """Print an error raised in the block, unless an engine of these models is gone: then nothing can go on."""
        try:
            yield
        except DistillError as error:
            if any(speaker.engine.death is not None for speaker in speakers):
                raise
            self.num_failed += 1
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                name = f"{speakers[0].name}: " if len(self.speakers) > 1 and len(speakers) == 1 else ""
                self.errors.print(Text(f"error: {name}{printable(problem)}"))
