"""The order of the training prompts: fixed by the seed, the same on every rank and any number of ranks.

A step's prompts follow from the seed and the step's number alone, so a resumed run needs no state: it asks for its next
step. `PromptOrder` holds all prompts; `PromptStream` makes each when its turn comes, for large datasets, and
reads up to the step at which a run resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache, partial
from typing import ClassVar, TypeVar

from distill_cli.data.rows import Stream, or_blank
from distill_cli.errors import ConfigError
from distill_cli.types import Example, Prompt

log = logging.getLogger(__name__)

Item = TypeVar("Item")

MOST_IN_VAIN = 100_000
"""Consecutive rows that make no prompt before an error: a stream may have no end."""


@dataclass
class PromptOrder:
    """A new permutation of known prompts each epoch."""

    prompts: Sequence[Prompt]
    batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            num = len(self.prompts)
            raise ConfigError(f"rollout.prompts_per_step={self.batch_size}: the training data has only {num} prompts")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all prompts in the order of the data; a resumed run compares it."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            (first, *others) = prompt.targets
            teachers = first.token_ids if not others and first.teacher == 0 else prompt.targets
            digest.update(f"{prompt.token_ids} {teachers}".encode())
        return digest.hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """Full batches; the prompts that remain are left out of the epoch."""
        return len(self.prompts) // self.batch_size

    def first(self, num: int) -> Sequence[Prompt]:
        """Return the prompts that the data begins with."""
        return self.prompts[:num]

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = permutation(len(self.prompts), seed=f"{self.seed}-{epoch}", shuffle=self.shuffle)
        return [self.prompts[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]


@dataclass
class PromptStream:
    """Prompts made one after the other; an epoch's last ones share a step with the next epoch's first.

    A prompt that is left out is replaced by the one that follows. The prompts of the next step are made in a thread
    while a step is sampled and trained on.
    """

    rows: Sequence[Example] | Stream
    make_prompt: Callable[[Example, int], Prompt | None]
    """Makes the prompt of an example and its place among all that were read; None leaves it out."""
    _: KW_ONLY
    batch_size: int
    seed: int
    shuffle: bool
    buffer: int
    """Rows of a `Stream` that are held for shuffling; a sequence is shuffled whole."""
    left_out: Callable[[], list[str]] = list
    """Returns what `make_prompt` left out or truncated so far, as warnings for the log: after the first step, and each
    time ten times as many rows were read."""

    fingerprint: ClassVar[None] = None
    """Unknown: it would take reading all prompts."""

    def __post_init__(self) -> None:
        self._num_read, self._warn_at = 0, 1
        self._making = threading.Lock()  # an environment that opens prompts answers one request at a time
        self._thread, self._ahead = ThreadPoolExecutor(1, "prompts"), Future[list[Prompt]]()
        self._ahead.set_result([])
        self._rewind()

    def _rewind(self) -> None:
        wait([self._ahead])
        self._next_step, self._prompts, self._last = 0, self._read(), list[Prompt]()
        self._ahead = self._thread.submit(self._next_prompts)

    def _next_prompts(self) -> list[Prompt]:
        return list(itertools.islice(self._prompts, self.batch_size))

    @property
    def steps_per_epoch(self) -> float:
        """Upper bound, since some prompts may be left out; infinite for a stream."""
        return math.inf if isinstance(self.rows, Stream) else len(self.rows) / self.batch_size

    def first(self, num: int) -> Sequence[Prompt]:
        """Return the prompts that training begins with."""
        return list(itertools.islice(self._read(), num))

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 0. Rows before it are read too, unless they have been."""
        if step < self._next_step - 1:
            self._rewind()
        while self._next_step <= step:
            self._last = self._ahead.result()
            self._next_step += 1
            if self._num_read >= self._warn_at:
                self._warn_at = 10 * self._num_read
                for warning in self.left_out():
                    log.warning("data.train, so far: %s", warning)
            self._ahead = self._thread.submit(self._next_prompts)
        return self._last

    def _read(self) -> Iterator[Prompt]:
        """Yield the prompts of one epoch after the other. Raises ConfigError if no row makes one."""
        place, num_in_vain = 0, 0
        for epoch in itertools.count():
            for example in self._epoch(epoch):
                with self._making:
                    prompt = self.make_prompt(example, place)
                place += 1
                self._num_read = max(self._num_read, place)
                num_in_vain = num_in_vain + 1 if prompt is None else 0
                if prompt is not None:
                    yield prompt
                elif num_in_vain == MOST_IN_VAIN:
                    break
            if num_in_vain in (place, MOST_IN_VAIN):
                reason = "; ".join(self.left_out()) or "blank"
                raise ConfigError(f"data.train: none of {num_in_vain} rows makes a prompt: {reason}")

    def _epoch(self, epoch: int) -> Iterator[Example]:
        seed = f"{self.seed}-{epoch}"
        if not isinstance(self.rows, Stream):
            order = permutation(len(self.rows), seed=seed, shuffle=self.shuffle)
            return (or_blank(partial(self.rows.__getitem__, index)) for index in order)
        return shuffled(self.rows, buffer=self.buffer, seed=seed) if self.shuffle else iter(self.rows)


class PromptBatches:
    """The batches of an order, of which those in use are kept: they are needed at different times."""

    def __init__(self, order: PromptOrder | PromptStream) -> None:
        self._order, self._kept = order, dict[int, list[Prompt]]()

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 0. Those of the steps between the newest kept one and it are read
        too: a stream would otherwise begin again for them."""
        if step not in self._kept:
            newest = max(self._kept, default=step)
            for number in range(newest + 1, step) if step > newest else ():
                self._kept[number] = self._order.batch(number)
            self._kept[step] = self._order.batch(step)
        return self._kept[step]

    def forget(self, *, before: int) -> None:
        """Drop the batches of the steps before this one."""
        self._kept = {step: prompts for step, prompts in self._kept.items() if step >= before}


@lru_cache(maxsize=1)
def permutation(size: int, *, seed: str, shuffle: bool) -> array[int]:
    """Return 0 to size - 1 in the seed's order, eight bytes each; one is kept for the steps of its epoch."""
    order = array("q", range(size))
    if shuffle:
        random.Random(seed).shuffle(order)
    return order


def shuffled(items: Iterable[Item], *, buffer: int, seed: str) -> Iterator[Item]:
    """Yield each item once, drawn at random from the next `buffer` items."""
    rng, items = random.Random(seed), iter(items)
    held = list(itertools.islice(items, buffer))
    for item in items:
        index = rng.randrange(buffer)
        item, held[index] = held[index], item
        yield item
    rng.shuffle(held)
    yield from held
