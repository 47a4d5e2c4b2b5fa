"""A chat without a terminal: each line of standard input is a question of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from distill_cli.chat import kl_view
from distill_cli.chat.answers import Answer
from distill_cli.chat.rounds import Rounds


def answer_lines(lines: Iterable[str], rounds: Rounds, *, as_json: bool, shows_kl: bool) -> int:
    """Answer each line that is not blank, in a conversation of its own; return the exit status, 1 if one failed."""
    for line in lines:
        if not (question := line.rstrip("\r\n")).strip():
            continue
        if as_json:
            for answer in rounds.ask_silently(question):
                print(json.dumps(row_of(answer, rounds, shows_kl=shows_kl)), flush=True)
        else:
            answers = rounds.ask(question)
            if shows_kl and answers:
                rounds.show_kl()
        for speaker in rounds.speakers:
            speaker.conversation.turns.clear()
    return 1 if rounds.num_failed else 0


def row_of(answer: Answer, rounds: Rounds, *, shows_kl: bool) -> dict[str, Any]:
    """Return an answer as a JSON object, with its KL if it is asked for: null if it cannot be compared."""
    speaker, (turn,) = answer.speaker, answer.speaker.conversation.turns
    row = {
        "question": answer.message,
        "answer": turn.answer,
        "tokens": len(turn.sample.token_ids),
        "token_ids": turn.sample.token_ids,
        "ended": answer.ended,
        "model": speaker.name,
    }
    if shows_kl and speaker.model.role == "student":
        found = rounds.measure(speaker, turn)
        pair = None if found is None else rounds.meter.pair(speaker)
        row["kl"] = None if found is None or pair is None else kl_view.as_json(found, pair)
    return row
