"""Several turns: the student writes, an environment answers, the student goes on. Tokens in, tokens out.

What the student wrote is never turned into text and back: an observation's tokens, with the chat template's markers
around them, are appended to the tokens that are there. The loss leaves them out (`Sample.trained`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from distill_cli.data.environments import Environment, Observation
from distill_cli.data.isolated import Failures
from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.settings import SamplingSettings
from distill_cli.types import Prompt, Rollout, Sample

SAID, SEEN = "WHAT-WAS-SAID", "WHAT-IS-SEEN"
"""Stand for a turn and an observation in a template."""


@dataclass(frozen=True)
class Turns:
    """How sequences go on after their first turn."""

    make: Callable[[], Environment]
    max_turns: int
    max_tokens: int
    """Of prompt, turns and observations together."""
    decode: Callable[[list[int]], str]
    observation_ids: Callable[[str, int], list[int]]
    """Observation, the turn's last token -> the tokens up to where the student goes on."""
    failures: Failures = field(default_factory=lambda: Failures("{} environments failed, and their sequences score 0"))
    """What environments failed at."""


@dataclass
class Growing:
    """One rollout as it grows."""

    prompt: Prompt
    seed: int
    environment: Environment | None
    """None where it failed before the first turn, which is then the last."""
    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    """Of no meaning if the sampler is not asked for it."""
    trained: list[bool] = field(default_factory=list)
    num_turns: int = 0
    reward: float | None = None
    finish_reason: str = ""
    """Empty as long as it goes on."""

    def rollout(self, *, has_logp: bool) -> Rollout:
        logp = self.logp if has_logp else None
        sample = Sample(self.token_ids, logp, self.finish_reason, trained=self.trained, num_turns=self.num_turns)
        return Rollout(self.prompt, sample, reward=self.reward)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn, counted from 0, of the sequence with `seed`; the first is the sequence's own."""
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
    sequences = [Growing(prompt, seed, turns.make()) for prompt, seed in zip(prompts, seeds, strict=True)]
    for sequence in sequences:
        try:
            sequence.environment.reset(sequence.prompt.example)
        except Exception as error:  # it may be a user's own
            turns.failures.add(error)
            sequence.environment = None
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


def take_turn(sequence: Growing, sample: Sample, turns: Turns) -> None:
    """Appends what the student wrote, and what it reads next unless the sequence has ended."""
    room = turns.max_tokens - len(sequence.prompt.token_ids) - len(sequence.token_ids)
    if len(sample.token_ids) > room:
        logp = (sample.logp or [])[:room]
        sample = replace(sample, token_ids=sample.token_ids[:room], logp=logp, finish_reason="length")
    sequence.token_ids += sample.token_ids
    sequence.logp += sample.logp or []
    sequence.trained += [True] * len(sample.token_ids)
    sequence.num_turns += 1
    seen = step(sequence.environment, turns.decode(sample.token_ids), failures=turns.failures)
    sequence.reward = seen.reward
    if sample.finish_reason == "length":
        sequence.finish_reason = "length"
    elif seen.done:
        sequence.finish_reason = "stop"
    elif sequence.num_turns == turns.max_turns:
        sequence.finish_reason = "turn_limit"
    else:
        observed = turns.observation_ids(seen.text, sample.token_ids[-1])
        if len(observed) >= room - len(sample.token_ids):  # no token would be left to answer it
            sequence.finish_reason = "length"
            return
        sequence.token_ids += observed
        sequence.logp += [0.0] * len(observed)
        sequence.trained += [False] * len(observed)


def step(environment: Environment | None, response: str, *, failures: Failures) -> Observation:
    """What the environment says; one that fails ends its sequence with reward 0 and is counted, and the run goes on."""
    if environment is not None:
        try:
            return environment.step(response)
        except Exception as error:  # it may be a user's own
            failures.add(error)
    return Observation(reward=0.0, done=True)


def observation_encoder(tokenizer, *, template_kwargs: dict, end_ids: set[int]) -> Callable[[str, int], list[int]]:
    """-> `Turns.observation_ids` by the tokenizer's chat template: what it puts between a turn and the next.

    Where the turn's last token is of `end_ids`, the template's own end of a turn is left out: it stands there already.
    Without a template the observation is a paragraph of its own.
    """
    if tokenizer.chat_template is None:
        return lambda text, last: tokenizer.encode(f"\n{text}\n", add_special_tokens=False)
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": SEEN},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
    between = rendered[rendered.index(SAID) + len(SAID) :]

    def encode(text: str, last: int) -> list[int]:
        ids = tokenizer.encode(between.replace(SEEN, text), add_special_tokens=False)
        return ids[1:] if last in end_ids and ids[0] in end_ids else ids

    return encode
