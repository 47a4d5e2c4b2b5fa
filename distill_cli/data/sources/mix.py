"""Several sources as one, each under its own name.

    sources:
      gsm8k: {source: table, path: openai/gsm8k, name: main, answer_from: final}
      deepscaler: {source: table, path: agentica-org/DeepScaleR-Preview-Dataset, question_key: problem}
    weights: {gsm8k: 1, deepscaler: 3}

Without weights every row comes once. With weights an epoch has every row of every source at least once, and rows of a
source that is small for its weight several times: none is lost. Streamed sources are drawn from at random by weight,
and begin again when they end.
"""

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError
from distill_cli.types import Example

MAX_ROWS = 100_000_000
"""Rows of an epoch: a weight that is far too small would need more than there is memory."""


def load(
    *,
    sources: dict[str, Any],
    weights: dict[str, Any] | None = None,
    seed: int = 0,
    context_key: str | None = None,
    teacher_key: str | None = None,
) -> Sequence[Example] | Stream:
    """Return the rows of all sources, in their order; `seed` is for the draws from streams.

    Args:
        context_key, teacher_key: columns of every source (`data.teacher_context`, `data.teacher_key`).

    Raises:
        ConfigError: no sources, weights that do not fit them or are far too small, or a source's own error.
    """
    from distill_cli.data.registry import load_examples

    if not sources:
        raise ConfigError("sources: a value is needed; name each source, as in sources.NAME.source=table")
    if weights is not None:
        _check_weights(sources, weights)
    columns = {"context": context_key, "teacher": teacher_key}
    loaded = {name: load_examples(dict(spec), key=f"sources.{name}", **columns) for name, spec in sources.items()}
    tables = {name: rows for name, rows in loaded.items() if not isinstance(rows, Stream)}
    if len(tables) == len(loaded):
        return Mixed(tables, weights)
    if weights is None:
        raise ConfigError("weights: needed for streamed sources; give each source a number, as in weights.NAME=1")
    return Stream(partial(_draw, loaded, weights, seed=seed))


class Mixed(Sequence[Example]):
    """Sources one after the other, each repeated as its weight requires; the last repetition may be cut short."""

    def __init__(self, sources: Mapping[str, Sequence[Example]], weights: Mapping[str, float] | None) -> None:
        self.names, self.sources = list(sources), list(sources.values())
        sizes = {name: len(rows) for name, rows in sources.items()}
        if weights is not None:
            per_weight = max(size / weights[name] for name, size in sizes.items())
            sizes = {name: max(size, math.floor(weights[name] * per_weight + 1e-6)) for name, size in sizes.items()}
            least = min(weights, key=weights.__getitem__)
            if (num := sum(sizes.values())) > MAX_ROWS:
                raise ConfigError(
                    f"weights.{least}={weights[least]:g}: an epoch with all of {least} once has {num:,} rows, must be "
                    f"at most {MAX_ROWS:,}; raise the weight, or give the source a limit"
                )
        self.ends = list(itertools.accumulate(sizes.values()))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        rows, begin = self.sources[number], self.ends[number - 1] if number else 0
        return replace(rows[(index - begin) % len(rows)], dataset=self.names[number])

    def __iter__(self) -> Iterator[Example]:
        for name, rows, begin, end in zip(self.names, self.sources, [0, *self.ends], self.ends, strict=False):
            for example in itertools.islice(itertools.cycle(rows), end - begin):
                yield replace(example, dataset=name)


def _check_weights(sources: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    if weights.keys() != sources.keys():
        raise ConfigError(f"weights: must be given for each of {', '.join(sources)}, not for {', '.join(weights)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"weights.{name}={weight}: must be a number above 0")


def _draw(
    sources: Mapping[str, Sequence[Example] | Stream], weights: Mapping[str, float], *, seed: int
) -> Iterator[Example]:
    """Yield examples without end."""
    rng, readers = random.Random(seed), {name: _repeated(rows) for name, rows in sources.items()}
    while True:
        (name,) = rng.choices(list(sources), [weights[name] for name in sources])
        yield replace(next(readers[name]), dataset=name)


def _repeated(rows: Sequence[Example] | Stream) -> Iterator[Example]:
    while (first := next(reader := iter(rows), None)) is not None:
        yield first
        yield from reader
