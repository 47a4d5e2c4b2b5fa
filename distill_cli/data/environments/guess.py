"""Guess and check: the environment answers each guess with right, too high or too low.

For any data whose answers are numbers. The last number of a turn is its guess; the reward is 1 once a guess is right.
"""

import re
from decimal import Decimal

from distill_cli.data.environments import Observation
from distill_cli.types import Example

NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


class Guess:
    """One sequence's game."""

    def reset(self, example: Example) -> str:
        self._answer = Decimal((example.answer or "").replace(",", ""))
        return example.question

    def step(self, response: str) -> Observation:
        numbers = NUMBER.findall(response.replace(",", ""))
        if not numbers:
            return Observation("There is no number in it. Try again.", reward=0.0)
        guess = Decimal(numbers[-1])
        if guess == self._answer:
            return Observation(reward=1.0, done=True)
        return Observation(f"{guess} is too {'high' if guess > self._answer else 'low'}. Try again.", reward=0.0)


make = Guess
