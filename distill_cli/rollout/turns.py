"""Several turns: the student writes, an environment answers, the student continues. Tokens in, tokens out.

The student's tokens are never decoded and encoded again: an observation's tokens, with the chat template's markers
around them, are appended to the existing tokens. The loss excludes them (`Sample.trained`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill_cli.data.environments import Environment, Observation
from distill_cli.data.isolated import Failures
from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.settings import SamplingSettings
from distill_cli.types import Prompt, Rollout, Sample

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
    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    """Meaningless if sampling has logp=False."""
    trained: list[bool] = field(default_factory=list)
    num_turns: int = 0
    reward: float | None = None
    finish_reason: str = ""
    """Empty while the sequence continues."""

    def append(self, token_ids: list[int], logp: list[float], *, trained: bool) -> None:
        """Append tokens of the student, or of an observation if not `trained`."""
        self.token_ids += token_ids
        self.logp += logp
        self.trained += [trained] * len(token_ids)

    def rollout(self, *, has_logp: bool) -> Rollout:
        """Return the finished rollout."""
        logp = self.logp if has_logp else None
        sample = Sample(self.token_ids, logp, self.finish_reason, trained=self.trained, num_turns=self.num_turns)
        return Rollout(self.prompt, sample, reward=self.reward)


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn, counted from 0, of the sequence with `seed`; turn 0 has the sequence's own."""
    return (seed + turn * 0x9E3779B97F4A7C15) % 2**63


def sample_turns(
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int],
    engine: AnsweringEngine,
    sampling: SamplingSettings,
    turns: Turns,
) -> list[Rollout]:
    """Sample a sequence of up to `turns.max_turns` turns for each prompt, rewarded by the environment.

    Args:
        sampling: `max_new_tokens` limits each turn.
    """
    sequences = [Growing(prompt, seed, start(prompt, turns)) for prompt, seed in zip(prompts, seeds, strict=True)]
    for turn in range(turns.max_turns):
        going = [sequence for sequence in sequences if not sequence.finish_reason]
        if not going:
            break
        samples = engine.sample(
            [sequence.prompt.token_ids + sequence.token_ids for sequence in going],
            seeds=[turn_seed(sequence.seed, turn) for sequence in going],
            sampling=sampling,
        )
        for sequence, sample in zip(going, samples, strict=True):
            take_turn(sequence, sample, turns)
    return [sequence.rollout(has_logp=sampling.logp) for sequence in sequences]


def start(prompt: Prompt, turns: Turns) -> Environment | None:
    """Return an environment for the prompt's example; None, counted, if it fails."""
    environment = turns.make()
    try:
        environment.reset(prompt.example)
    except Exception as error:  # environments may be the user's code
        turns.failures.add(error)
        return None
    return environment


def take_turn(sequence: Growing, sample: Sample, turns: Turns) -> None:
    """Append the student's turn, and the observation unless the sequence has ended."""
    room = turns.max_tokens - len(sequence.prompt.token_ids) - len(sequence.token_ids)
    if len(sample.token_ids) > room:
        logp = (sample.logp or [])[:room]
        sample = replace(sample, token_ids=sample.token_ids[:room], logp=logp, finish_reason="length")
    sequence.append(sample.token_ids, sample.logp or [], trained=True)
    sequence.num_turns += 1
    observation = step(sequence.environment, turns.decode(sample.token_ids), failures=turns.failures)
    sequence.reward = observation.reward
    if sample.finish_reason == "length":
        sequence.finish_reason = "length"
    elif observation.done:
        sequence.finish_reason = "stop"
    elif sequence.num_turns == turns.max_turns:
        sequence.finish_reason = "turn_limit"
    else:
        ids = turns.observation_ids(observation.text, sample.token_ids[-1])
        if len(ids) >= room - len(sample.token_ids):  # no room for a token of the next turn
            sequence.finish_reason = "length"
        else:
            sequence.append(ids, [0.0] * len(ids), trained=False)


def step(environment: Environment | None, response: str, *, failures: Failures) -> Observation:
    """Return the environment's observation; one that fails is counted and ends its sequence with reward 0."""
    if environment is not None:
        try:
            return environment.step(response)
        except Exception as error:  # environments may be the user's code
            failures.add(error)
    return Observation(reward=0.0, done=True)


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
