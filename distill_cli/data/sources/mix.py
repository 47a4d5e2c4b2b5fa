"""Several sources as one, each under its own name.

    sources:
      gsm8k: {source: table, path: openai/gsm8k, name: main, answer_from: final}
      deepscaler: {source: table, path: agentica-org/DeepScaleR-Preview-Dataset, question_key: problem}
    weights: {gsm8k: 1, deepscaler: 3}

Without weights every row comes once. With them a pass sees every row of every source at least once, and those that are
small for their weight several times: none is lost. Sources that are streamed are drawn from at random by weight, and
begin again when they end.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError
from distill_cli.types import Example

MAX_ROWS = 100_000_000
"""Of a pass: a weight that is far too small would ask for more than there is memory."""


def load(
    *, sources: dict[str, Any], weights: dict[str, Any] | None = None, seed: int = 0
) -> Sequence[Example] | Stream:
    """The rows of all sources, in their order; `seed` is of the draws from streams.

    Raises:
        ConfigError: no sources, weights that do not fit them or are far too small, or what a source has to say.
    """
    from distill_cli.data.registry import load_examples

    if not sources:
        raise ConfigError("sources: none are given; name each, as in sources.NAME.source=table")
    shares = _shares(sources, weights)
    loaded = {name: load_examples(dict(spec), key=f"sources.{name}") for name, spec in sources.items()}
    if not any(isinstance(rows, Stream) for rows in loaded.values()):
        return Mixed(loaded, shares)
    if shares is None:
        raise ConfigError("weights: needed where a source is streamed; give each one a number, as in weights.NAME=1")
    return Stream(lambda: _draw(loaded, shares, seed=seed))


class Mixed(Sequence[Example]):
    """Sources end to end, each as often as its share asks for; the last time it may be cut short."""

    def __init__(self, sources: Mapping[str, Sequence[Example]], shares: Mapping[str, float] | None) -> None:
        self.names, self.sources = list(sources), list(sources.values())
        sizes = [len(rows) for rows in self.sources]
        if shares is not None:
            per_share = max(size / shares[name] for name, size in zip(self.names, sizes, strict=True))
            sizes = [
                max(size, math.floor(shares[name] * per_share + 1e-6))
                for name, size in zip(self.names, sizes, strict=True)
            ]
            if sum(sizes) > MAX_ROWS:
                least = min(shares, key=shares.get)
                raise ConfigError(
                    f"weights.{least}={shares[least]:g}: a pass that sees all of {least} once has {sum(sizes):,} rows, "
                    f"and at most {MAX_ROWS:,} may be; weigh it more, or give the source a limit"
                )
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        rows, begin = self.sources[number], self.ends[number - 1] if number else 0
        return replace(rows[(index - begin) % len(rows)], dataset=self.names[number])

    def __iter__(self) -> Iterator[Example]:
        for name, rows, begin, end in zip(self.names, self.sources, [0, *self.ends], self.ends, strict=False):
            for example in itertools.islice(itertools.cycle(rows), end - begin):
                yield replace(example, dataset=name)


def _shares(sources: Mapping[str, Any], weights: Mapping[str, Any] | None) -> dict[str, float] | None:
    if weights is None:
        return None
    if weights.keys() != sources.keys():
        raise ConfigError(f"weights: must be given for each of {', '.join(sources)}, not for {', '.join(weights)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"weights.{name}={weight}: must be a number above 0")
    return dict(weights)


def _draw(
    sources: Mapping[str, Sequence[Example] | Stream], shares: Mapping[str, float], *, seed: int
) -> Iterator[Example]:
    """Without end."""
    rng, names = random.Random(seed), list(sources)
    readers = {name: iter(rows) for name, rows in sources.items()}
    weights = [shares[name] for name in names]
    while True:
        (name,) = rng.choices(names, weights)
        example = next(readers[name], None)
        if example is None:
            readers[name] = iter(sources[name])
            example = next(readers[name])
        yield replace(example, dataset=name)
