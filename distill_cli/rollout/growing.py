"""A sequence as it is written, request by request: a new one for each turn, and one for each part of a turn.

    growing = Growing.begin(prompt, seed=seed, writing=writing)
    while not growing.is_over:
        growing.take(engine's answer to growing.request(limit=256))

A part ends where the room for it does (`rollout.carry_over`): what is written then waits for the next step, and may
wait in a checkpoint (`Growing.resume`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from distill_cli.data.environments import Environment, Observation
from distill_cli.engines.base import AnsweringEngine, OnEnd, Request
from distill_cli.engines.settings import SamplingSettings
from distill_cli.rollout.in_flight import Unfinished
from distill_cli.rollout.turns import Turns, attempt, start
from distill_cli.types import Prompt, Rollout, Sample


def request_seed(seed: int, number: int) -> int:
    """Return the seed of a request, counted from 0, of the sequence with `seed`; the first has the sequence's own."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def turns_of(sample: Sample) -> list[list[int]]:
    """Return the tokens of each turn that the student wrote, between the observations."""
    pairs = zip(sample.token_ids, sample.trained or [True] * len(sample.token_ids), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [[token for token, _ in run] for is_written, run in runs if is_written]


@dataclass
class Growing:
    """One sequence that is being written."""

    prompt: Prompt
    seed: int
    turns: Turns | None
    """How it continues after its first turn; None if it does not."""
    sample: Sample
    """The answer so far. Its `finish_reason` is empty while the sequence continues."""
    environment: Environment | None = None
    """None without turns, or if it failed before the first turn, which is then the last."""
    reward: float | None = None
    turn_start: int = 0
    num_requests: int = 0
    _room: int | None = None
    """`room` of the last request, if it was less than what the turn had left."""

    @classmethod
    def begin(cls, prompt: Prompt, *, seed: int, turns: Turns | None, logp: bool = True) -> Growing:
        """Return a sequence of which nothing is written; `logp` as in `SamplingSettings`."""
        many = turns is not None
        empty = Sample([], [] if logp else None, "", trained=[] if many else None, num_turns=0 if many else 1)
        return cls(prompt, seed, turns, empty, None if turns is None else start(prompt, turns))

    @classmethod
    def resume(cls, prompt: Prompt, unfinished: Unfinished, *, seed: int, turns: Turns | None) -> Growing:
        """Return a sequence as another process left it; a new environment gets its turns again."""
        growing = cls.begin(prompt, seed=seed, turns=turns)
        growing.sample = unfinished.sample
        growing.turn_start, growing.num_requests = unfinished.turn_start, unfinished.num_requests
        if turns is not None:
            for turn in turns_of(unfinished.sample.part(0, unfinished.turn_start)):
                environment = growing.environment
                if environment is not None and attempt(environment.step, turns.decode(turn), turns.failures) is None:
                    growing.environment = None
        return growing

    def unfinished(self, *, began: int) -> Unfinished:
        """Return what another process needs to go on."""
        return Unfinished(self.sample, self.turn_start, self.num_requests, began)

    @property
    def is_over(self) -> bool:
        return bool(self.sample.finish_reason)

    def request(self, *, limit: int, room: int | None = None) -> Request:
        """Return the request for the rest of the turn, or for its next tokens.

        Args:
            limit: greatest length of a turn.
            room: greatest length of the answer to this request; None leaves the turn whole.
        """
        left = max(limit - (len(self.sample.token_ids) - self.turn_start), 1)  # a limit may have fallen
        self._room = room if room is not None and room < left else None
        asked = self._room if self._room is not None else None if self._is_whole else left
        ids = self.prompt.token_ids + self.sample.token_ids
        return Request(ids, request_seed(self.seed, self.num_requests), asked)

    @property
    def _is_whole(self) -> bool:
        """Whether nothing of the turn is written."""
        return len(self.sample.token_ids) == self.turn_start

    def take(self, answer: Sample) -> None:
        """Append the engine's answer to the last request, and the observation if it ends a turn but not the last."""
        self.num_requests += 1
        is_cut = answer.finish_reason == "length" and len(answer.token_ids) == self._room
        written = replace(answer, finish_reason="", num_turns=self.sample.num_turns)
        self.sample = self.sample + written
        if not is_cut:
            self._end_turn(answer.finish_reason)

    def _end_turn(self, reason: str) -> None:
        if (turns := self.turns) is None:
            self.sample = replace(self.sample, finish_reason=reason)
            return
        observation, seen = None, list[int]()
        room = turns.max_tokens - len(self.prompt.token_ids) - self.turn_start
        if len(self.sample.token_ids) - self.turn_start > room:
            self.sample, reason = self.sample.part(0, self.turn_start + room), "length"
        turn_ids = self.sample.token_ids[self.turn_start :]
        if self.environment is not None:
            observation = attempt(self.environment.step, turns.decode(turn_ids), turns.failures)
        observation = observation or Observation(reward=0.0, done=True)
        self.reward = observation.reward
        number = self.sample.num_turns + 1
        if reason != "length":
            reason = "stop" if observation.done else "turn_limit" if number == turns.max_turns else ""
        if not reason:
            seen = turns.observation_ids(observation.text, turn_ids[-1])
            if len(seen) >= room - len(turn_ids):  # no room for a token of the next turn
                seen, reason = [], "length"
        unwritten = Sample(seen, [0.0] * len(seen), reason, trained=[False] * len(seen), num_turns=number)
        self.sample = self.sample + replace(unwritten, logp=None if self.sample.logp is None else unwritten.logp)
        self.turn_start = len(self.sample.token_ids)


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
        on_end: called with each answer that has ended.
    """
    pairs, logp = zip(prompts, seeds, strict=True), sampling.logp
    sequences = [Growing.begin(prompt, seed=seed, turns=turns, logp=logp) for prompt, seed in pairs]

    def then(index: int, answer: Sample) -> Request | None:
        sequence = sequences[index]
        sequence.take(answer)
        if not sequence.is_over:
            return sequence.request(limit=sampling.max_new_tokens)
        if on_end is not None:
            on_end(index, sequence.sample)
        return None

    first = [sequence.request(limit=sampling.max_new_tokens) for sequence in sequences]
    engine.sample_chains(first, sampling=sampling, then=then)
    return [Rollout(sequence.prompt, sequence.sample, sequence.reward) for sequence in sequences]
