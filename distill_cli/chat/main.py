"""`distill chat` from what was typed to its end. No torch before everything is checked."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import IO, TYPE_CHECKING, TextIO

from rich.text import Text

from distill_cli.chat.engine import Engines
from distill_cli.chat.engine_settings import EnginePlan, memory_problems, plan_models, plan_teacher
from distill_cli.chat.setup import Setup, pair_of, prepare
from distill_cli.engines.process_setup import import_transformers
from distill_cli.errors import ConfigError, DistillError, refuse
from distill_cli.launch.local import stop_signals
from distill_cli.terminal.console import Console
from distill_cli.terminal.printable import printable

if TYPE_CHECKING:
    from distill_cli.chat.answers import Speaker

WIDTH = 160
"""Columns of a table that is not printed on a terminal."""


def chat(
    subject: str,
    overrides: Sequence[str],
    *,
    against: str | None,
    step: str | None,
    teacher: str | None,
    shows_kl: bool,
    as_json: bool,
) -> int:
    """Talk with a model, or two side by side; return the exit status.

    Args:
        against, step, teacher: see `prepare`.
        shows_kl: compare each answer with the teacher.
        as_json: print a JSON object for each answer to a line of standard input.

    Raises:
        ConfigError: what was typed is wrong; nothing was started.
        DistillError: an engine could not be started, or is gone.
    """
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    console, errors = console_of(sys.stdout), console_of(sys.stderr)
    with stop_signals():
        setup = prepare(subject, overrides, against=against, step=step, teacher=teacher, console=errors)
        plans = plan_models(setup)
        refuse(problems(setup, plans, shows_kl=shows_kl))
        return talk(setup, plans, console, errors, at_terminal=at_terminal, shows_kl=shows_kl, as_json=as_json)


def console_of(stream: TextIO) -> Console:
    """Return a console that leaves the wrapping of lines to the reader, unless that is a terminal."""
    width = None if stream.isatty() else WIDTH
    return Console(file=stream, highlight=False, width=width, soft_wrap=width is not None)


def problems(setup: Setup, plans: Sequence[EnginePlan], *, shows_kl: bool) -> list[str]:
    """Return why the engines do not fit. Raises ConfigError if there is no teacher to compare with, and must be."""
    needed = [*plans]
    if shows_kl:
        pair = pair_of(setup, setup.models[0])  # the second one may be a teacher
        needed += [plan_teacher(setup, pair)] if setup.has_teacher_engine else []
    return list(memory_problems(needed, setup.models[0].resolved.ranks))


def talk(
    setup: Setup,
    plans: Sequence[EnginePlan],
    console: Console,
    errors: Console,
    *,
    at_terminal: bool,
    shows_kl: bool,
    as_json: bool,
) -> int:
    """Start the engines, talk until the input ends, and end the engines; return the exit status."""
    with ExitStack() as stack:
        status = stack.enter_context(errors.status(f"starting {' and '.join(model.name for model in setup.models)}"))
        output = stack.enter_context(engine_log())
        runner = stack.enter_context(asyncio.Runner())
        engines = Engines(setup, runner, output)
        stack.callback(engines.close)
        started = engines.start_models(plans, meanwhile=import_libraries)
        from distill_cli.chat.interrupts import noted_interrupts
        from distill_cli.chat.lines import answer_lines
        from distill_cli.chat.rounds import Interrupts, Rounds
        from distill_cli.chat.session import Session
        from distill_cli.chat.start import speaker_of, teacher_for
        from distill_cli.chat.token_kl import KlMeter

        speakers = [speaker_of(model, engine) for model, engine in zip(setup.models, started, strict=True)]
        meter = KlMeter(setup, partial(teacher_for, others=speakers, engines=engines))
        stack.callback(meter.close)
        status.stop()
        for line in banner(setup, speakers, at_terminal=at_terminal):
            errors.print(Text(printable(line), style="dim"))
        interrupts: Interrupts = noted_interrupts if at_terminal else lambda: nullcontext(lambda: False)
        rounds = Rounds(runner, speakers, meter, console, errors, setup.config.train.seed, interrupts)
        for stream in (sys.stdin, sys.stdout):  # whose encoding may lack what is typed or written
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # TextIOWrappers
        if at_terminal:
            return Session(rounds, console, shows_kl).run()
        return answer_lines(sys.stdin, rounds, as_json=as_json, shows_kl=shows_kl)


def import_libraries() -> None:
    """Import what takes seconds."""
    import_transformers()
    importlib.import_module("distill_cli.chat.start")


@contextmanager
def engine_log() -> Iterator[IO[bytes] | None]:
    """Yield a file for what engines print; a copy is kept, and named in the error, if one fails. None for debugging."""
    if os.environ.get("DISTILL_DEBUG"):
        yield None
        return
    with tempfile.TemporaryFile(prefix="distill-chat-") as file:
        try:
            yield file
        except DistillError as error:
            file.seek(0)
            if isinstance(error, ConfigError) or not (content := file.read()):
                raise
            with tempfile.NamedTemporaryFile(prefix="distill-chat-", suffix=".log", delete=False) as kept:
                kept.write(content)
            raise DistillError(f"{error}; log: {kept.name}") from error


def banner(setup: Setup, speakers: Sequence[Speaker], *, at_terminal: bool) -> list[str]:
    """Return the lines that are printed before the first question."""
    lines = [line for speaker in speakers for line in facts(speaker, with_name=len(speakers) > 1)]
    if setup.teacher is not None and at_terminal:
        lines.append(f"/kl compares the last answer with the teacher {setup.teacher}".removesuffix(" teacher"))
    return [*lines, *(["/help lists commands, Ctrl-D leaves"] if at_terminal else [])]


def facts(speaker: Speaker, *, with_name: bool) -> list[str]:
    """Return what there is to know of a model of the chat: its folder, context, sampling and prompts."""
    sampling, model, data = speaker.sampling, speaker.model, speaker.model.resolved.config.data
    name, longest = f"{speaker.name}: " if with_name else "", min(sampling.max_new_tokens, model.context)
    optional = {
        f"top_p {sampling.top_p:g}": sampling.top_p != 1,
        f"top_k {sampling.top_k}": sampling.top_k > 0,
        f"stop {list(sampling.stop)}": bool(sampling.stop),
    }
    settings = [f"temperature {sampling.temperature:g}", f"at most {longest} tokens an answer"]
    settings += [text for text, is_set in optional.items() if is_set]
    lines = [f"{name}{model.resolved.student.path}, {model.context} tokens of context; {', '.join(settings)}"]
    if not speaker.conversation.has_template:
        lines.append(f"{name}no chat template: each message is a text to complete, by itself")
    if data.prompt_template != "{question}":
        lines.append(f"{name}each message is put into data.prompt_template={data.prompt_template!r}")
    if data.system_prompt is not None:
        lines.append(f"{name}system prompt: {data.system_prompt!r}")
    return lines
