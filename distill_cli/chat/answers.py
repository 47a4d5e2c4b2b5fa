"""The models of a chat and their answers, as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distill_cli.chat.conversation import Conversation, TextStream, Turn
from distill_cli.chat.engine import ChatEngine, advance
from distill_cli.chat.setup import ChatModel
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.stepwise import Piece
from distill_cli.types import Sample

STOPPED = "stopped"
"""`Answer.ended` if Ctrl-C stopped it."""


@dataclass(frozen=True)
class Speaker:
    """A model with its engine and a conversation of its own."""

    model: ChatModel
    engine: ChatEngine
    conversation: Conversation
    sampling: SamplingSettings
    decode: Callable[[list[int]], str]
    """Returns the text of token ids, without special tokens."""

    @property
    def name(self) -> str:
        return self.model.name


@dataclass
class Answer:
    """An answer as it is written, one of several at a time."""

    speaker: Speaker
    message: str
    seed: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    text: str = ""
    ended: str | None = None
    """`stop`, `length`, or STOPPED; None while it is written."""

    def __post_init__(self) -> None:
        """Begin it. Raises ConfigError if the context is full."""
        self.question = self.speaker.conversation.render(self.message)
        self._stream = TextStream(self.speaker.decode)
        self.speaker.engine.begin(self.question.prompt_ids, seed=self.seed, sampling=self.speaker.sampling)

    def add(self, piece: Piece) -> str:
        """Take what the engine wrote; return the text that it completes."""
        self.ids += piece.token_ids
        self.logp += piece.logp
        self.ended = piece.finish_reason
        text = self._stream.add(piece.token_ids, is_last=self.ended is not None)
        self.text += text
        return text

    def stop(self) -> None:
        """End it here."""
        self.speaker.engine.stop()
        self.ended = STOPPED

    def keep(self) -> Turn:
        """Make it a turn of the conversation, and return the turn."""
        reason = "stop" if self.ended == "stop" else "length"
        turn = Turn(self.question, Sample(self.ids, self.logp, reason), self.speaker.decode(self.ids))
        self.speaker.conversation.turns.append(turn)
        return turn

    @property
    def remark(self) -> str:
        """What to say of its end; empty if the model ended it."""
        if self.ended == STOPPED:
            return "stopped; what is written stays in the conversation (/retry answers again)"
        if self.ended != "length":
            return ""
        conversation, limit = self.speaker.conversation, self.speaker.sampling.max_new_tokens
        if len(self.ids) >= limit:
            return f"cut off after {limit} tokens; raise --max-new-tokens"
        return f"cut off: the context of {conversation.context} tokens is full; /reset, or {conversation.raise_context}"


def write(
    runner: asyncio.Runner,
    answers: Sequence[Answer],
    *,
    on_text: Callable[[Answer, str], object],
    should_stop: Callable[[], bool],
) -> None:
    """Let the models write their answers at the same time, until all have ended or `should_stop` returns true.

    Raises:
        DistillError: an engine failed.
    """
    while going := [answer for answer in answers if answer.ended is None]:
        if should_stop():
            for answer in going:
                answer.stop()
            return
        pieces = advance(runner, [answer.speaker.engine for answer in going])
        for answer, piece in zip(going, pieces, strict=True):
            on_text(answer, answer.add(piece))
