"""The order in which training sees its prompts: fixed by the seed, the same on every rank and any number of ranks.

A step's prompts follow from the seed and the step's number alone, so a resumed run needs no state: it asks for its next
step. `PromptOrder` has all prompts at hand; `PromptStream` makes them when their turn comes, for sets that are too
large for that, and reads its way to the step where a run goes on.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import TypeVar

from distill_cli.data.rows import Stream, or_blank
from distill_cli.errors import ConfigError
from distill_cli.types import Example, Prompt

log = logging.getLogger(__name__)

Item = TypeVar("Item")

MOST_IN_VAIN = 100_000
"""Rows in a row that make no prompt: a stream may have no end."""


@dataclass
class PromptOrder:
    """A new permutation of known prompts each epoch."""

    prompts: Sequence[Prompt]
    batch_size: int
    seed: int
    shuffle: bool
    _epoch: int = field(default=-1, init=False, repr=False)
    _order: array = field(default_factory=lambda: array("q"), init=False, repr=False)
    """Of `_epoch`."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"rollout.prompts_per_step={self.batch_size}: the training data has only {len(self.prompts)} prompts"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of all prompts in the order of the data: a resumed run compares it."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{prompt.token_ids} {prompt.teacher_token_ids}".encode())
        return digest.hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """A last batch that is not full is left out of its epoch."""
        return len(self.prompts) // self.batch_size

    def first(self, num: int) -> Sequence[Prompt]:
        """Those that the data begins with."""
        return self.prompts[:num]

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(len(self.prompts), seed=f"{self.seed}-{epoch}", shuffle=self.shuffle)
        return [self.prompts[i] for i in self._order[place * self.batch_size : (place + 1) * self.batch_size]]


class PromptStream:
    """Prompts made one after the other; an epoch's last ones share a step with the next epoch's first.

    Prompts that are left out (`make_prompt` gives None) are made up for by those that follow.
    """

    fingerprint = None
    """It would have to read all of them."""

    def __init__(
        self,
        rows: Sequence[Example] | Stream,
        make_prompt: Callable[[Example, int], Prompt | None],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        buffer: int,
        left_out: Callable[[], list[str]] = list,
    ) -> None:
        """
        Args:
            make_prompt: of an example and its place among all that were read.
            buffer: rows of a `Stream` that are held for shuffling it; a sequence is shuffled whole.
            left_out: what `make_prompt` left out or cut so far, in words: told after the first step, and whenever ten
                times as many rows were read.
        """
        self._rows, self._make_prompt, self._left_out = rows, make_prompt, left_out
        self._num_read, self._tell_at = 0, 1
        self._batch_size, self._seed, self._shuffle, self._buffer = batch_size, seed, shuffle, buffer
        self._next_step, self._prompts, self._last = 0, self._read(), []

    @property
    def steps_per_epoch(self) -> float:
        """At most, where some prompts are left out; of a stream nobody knows it."""
        return math.inf if isinstance(self._rows, Stream) else len(self._rows) / self._batch_size

    def first(self, num: int) -> Sequence[Prompt]:
        """Those that training begins with."""
        return list(islice(self._read(), num))

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0. What lies before it is read, too, unless it has been."""
        if step == self._next_step - 1:
            return self._last
        if step < self._next_step:
            self._next_step, self._prompts = 0, self._read()
        while self._next_step <= step:
            self._last = [next(self._prompts) for _ in range(self._batch_size)]
            self._next_step += 1
            if self._num_read >= self._tell_at:
                self._tell_at = 10 * self._num_read
                for words in self._left_out():
                    log.warning("data.train, so far: %s", words)
        return self._last

    def _read(self) -> Iterator[Prompt]:
        """Epoch after epoch."""
        place, epoch, num_in_vain = 0, 0, 0
        while True:
            for example in self._epoch(epoch):
                prompt = self._make_prompt(example, place)
                place += 1
                self._num_read = max(self._num_read, place)
                num_in_vain = num_in_vain + 1 if prompt is None else 0
                if prompt is not None:
                    yield prompt
                elif num_in_vain == MOST_IN_VAIN:
                    raise self._no_prompt(num_in_vain)
            if num_in_vain == place:
                raise self._no_prompt(place)
            epoch += 1

    def _no_prompt(self, number: int) -> ConfigError:
        return ConfigError(
            f"data.train: none of {number} rows makes a prompt: {'; '.join(self._left_out()) or 'blank'}"
        )

    def _epoch(self, epoch: int) -> Iterator[Example]:
        seed = f"{self._seed}-{epoch}"
        if not isinstance(self._rows, Stream):
            order = permutation(len(self._rows), seed=seed, shuffle=self._shuffle)
            return (or_blank(partial(self._rows.__getitem__, index)) for index in order)
        return shuffled(self._rows, buffer=self._buffer, seed=seed) if self._shuffle else iter(self._rows)


def permutation(size: int, *, seed: str, shuffle: bool) -> array:
    """0 to size - 1 in the seed's order; eight bytes each."""
    order = array("q", range(size))
    if shuffle:
        random.Random(seed).shuffle(order)
    return order


def shuffled(items: Iterable[Item], *, buffer: int, seed: str) -> Iterator[Item]:
    """Each item once, drawn at random from the `buffer` items that come next."""
    rng, held = random.Random(seed), []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        index = rng.randrange(buffer)
        item, held[index] = held[index], item
        yield item
    rng.shuffle(held)
    yield from held
