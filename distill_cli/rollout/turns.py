"""How sequences of several turns continue: the student writes, an environment answers, the student continues.

`growing.Growing` writes them, tokens in, tokens out. The student's tokens are never decoded and encoded again: an
observation's tokens, with the chat template's markers around them, are appended to the existing tokens. The loss
excludes them (`Sample.trained`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from distill_cli.data.environments import Environment
from distill_cli.data.isolated import Failures
from distill_cli.types import Prompt

Given = TypeVar("Given")
Result = TypeVar("Result")
TURN, OBSERVATION = "WHAT-WAS-SAID", "WHAT-IS-SEEN"
"""Placeholders of a turn and an observation in a template."""


@dataclass(frozen=True)
class Turns:
    """How sequences continue after their first turn."""

    make: Callable[[], Environment]
    max_turns: int
    max_tokens: int
    """Limit of prompt, turns and observations together."""
    decode: Callable[[list[int]], str]
    observation_ids: Callable[[str, int], list[int]]
    """Returns the tokens from a turn to the next, given the observation and the turn's last token."""
    failures: Failures = field(default_factory=lambda: Failures("{} environments failed, and their sequences score 0"))
    """The environments' errors."""


def start(prompt: Prompt, turns: Turns) -> Environment | None:
    """Return an environment for the prompt's example; None if it fails."""
    environment = turns.make()
    return None if attempt(environment.reset, prompt.example, turns.failures) is None else environment


def attempt(function: Callable[[Given], Result], argument: Given, failures: Failures) -> Result | None:
    """Return the result of an environment's function; None, counted, if it fails: it may be the user's code."""
    try:
        return function(argument)
    except Exception as error:
        failures.add(error)
        return None


def observation_encoder(
    tokenizer: PreTrainedTokenizerBase, *, template_kwargs: Mapping[str, Any], end_ids: set[int]
) -> Callable[[str, int], list[int]]:
    """Return `Turns.observation_ids` by the tokenizer's chat template.

    If the turn's last token is one of `end_ids`, the template's own end of a turn is omitted. Without a template the
    observation is a paragraph of its own.
    """
    if tokenizer.chat_template is None:
        return lambda text, last: tokenizer.encode(f"\n{text}\n", add_special_tokens=False)
    between = text_after_turn(tokenizer, observation=OBSERVATION, template_kwargs=template_kwargs)

    def encode(text: str, last: int) -> list[int]:
        ids = tokenizer.encode(between.replace(OBSERVATION, text), add_special_tokens=False)
        return ids[1:] if last in end_ids and ids[0] in end_ids else ids

    return encode


def text_after_turn(
    tokenizer: PreTrainedTokenizerBase, *, observation: str | None = None, template_kwargs: Mapping[str, Any]
) -> str:
    """Return the chat template's text after an answer: to the next one if an observation follows, else to the end."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": TURN}]
    if observation is not None:
        messages.append({"role": "user", "content": observation})
        template_kwargs = {**template_kwargs, "add_generation_prompt": True}
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    assert isinstance(rendered, str)
    return rendered[rendered.index(TURN) + len(TURN) :]
