"""Multi-turn sequences: the student writes, an environment answers, the student continues. Tokens in, tokens out.

The student's tokens are never decoded and encoded again: an observation's tokens, with the chat template's markers
around them, are appended to the existing tokens. The loss excludes them (`Sample.trained`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from distill_cli.data.environments import Environment, Observation
from distill_cli.data.isolated import Failures
from distill_cli.engines.base import AnsweringEngine, OnEnd
from distill_cli.engines.settings import SamplingSettings
from distill_cli.types import Prompt, Rollout, Sample

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


@dataclass
class Growing:
    """One rollout as it grows."""

    prompt: Prompt
    seed: int
    environment: Environment | None
    """None if it failed before the first turn, which is then the last."""
    sample: Sample
    """Its `finish_reason` is empty while the sequence continues."""
    reward: float | None = None


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn, counted from 0, of the sequence with `seed`; turn 0 has the sequence's own."""
    return (seed + turn * 0x9E3779B97F4A7C15) % 2**63


def sample_turns(
    prompts: Sequence[Prompt],
    turns: Turns,
    seeds: Sequence[int],
    engine: AnsweringEngine,
    sampling: SamplingSettings,
    *,
    on_end: OnEnd | None = None,
) -> list[Rollout]:
    """Sample a sequence of up to `turns.max_turns` turns for each prompt, rewarded by the environment.

    Args:
        sampling: `max_new_tokens` limits each turn.
        on_end: called with the answers that ended with a turn of all.
    """
    empty = Sample([], [] if sampling.logp else None, finish_reason="", trained=[], num_turns=0)
    pairs = zip(prompts, seeds, strict=True)
    sequences = [Growing(prompt, seed, start(prompt, turns), empty) for prompt, seed in pairs]
    for turn in range(turns.max_turns):
        going = {i: sequence for i, sequence in enumerate(sequences) if not sequence.sample.finish_reason}
        if not going:
            break
        token_ids = [sequence.prompt.token_ids + sequence.sample.token_ids for sequence in going.values()]
        turn_seeds = [turn_seed(sequence.seed, turn) for sequence in going.values()]
        samples = engine.sample(token_ids, seeds=turn_seeds, sampling=sampling)
        for (index, sequence), sample in zip(going.items(), samples, strict=True):
            take_turn(sequence, sample, turns)
            if on_end is not None and sequence.sample.finish_reason:
                on_end(index, sequence.sample)
    return [Rollout(sequence.prompt, sequence.sample, sequence.reward) for sequence in sequences]


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


def take_turn(sequence: Growing, turn: Sample, turns: Turns) -> None:
    """Append the student's turn, and the observation unless the sequence has ended."""
    before, environment, observation = sequence.sample, sequence.environment, None
    room = turns.max_tokens - len(sequence.prompt.token_ids) - len(before.token_ids)
    if len(turn.token_ids) > room:
        logp = (turn.logp or [])[:room]
        turn = replace(turn, token_ids=turn.token_ids[:room], logp=logp, finish_reason="length")
    text, seen, reason = turns.decode(turn.token_ids), list[int](), ""
    if environment is not None:
        observation = attempt(environment.step, text, turns.failures)
    observation = observation or Observation(reward=0.0, done=True)
    sequence.reward = observation.reward
    if turn.finish_reason == "length":
        reason = "length"
    elif observation.done:
        reason = "stop"
    elif before.num_turns + 1 == turns.max_turns:
        reason = "turn_limit"
    else:
        seen = turns.observation_ids(observation.text, turn.token_ids[-1])
        if len(seen) >= room - len(turn.token_ids):  # no room for a token of the next turn
            seen, reason = [], "length"
    sequence.sample = Sample(
        before.token_ids + turn.token_ids + seen,
        None if before.logp is None else before.logp + (turn.logp or []) + [0.0] * len(seen),
        reason,
        trained=(before.trained or []) + [True] * len(turn.token_ids) + [False] * len(seen),
        num_turns=before.num_turns + 1,
    )


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
