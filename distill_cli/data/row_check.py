"""Check the data before anything starts: rows without a question or an answer, prompts in both sets. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from distill_cli.config.schema import Config, OffPolicy
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError
from distill_cli.metrics import find
from distill_cli.types import Example

MOST_ROWS_READ = 100_000
"""Rows of the training data that are read; the rest is assumed to be like them."""
STREAMED_ROWS_READ = 100
"""Likewise for a stream, each of whose rows may have to be downloaded."""
CHARACTERS_READ = 20_000
"""Characters of a message that are compared: messages that begin with the same ones count as the same."""


@dataclass(frozen=True)
class DataFacts:
    """What `check_data` finds."""

    num_train: int | None = 0
    """Rows; None for a stream."""
    num_validation: int | None = 0
    sample: Example | None = None
    """The first training row with a question."""
    warnings: tuple[str, ...] = ()


def check_data(config: Config, known: dict[str, DataFacts] | None = None, *, trains_on_rows: bool = True) -> DataFacts:
    """Read the data, as far as that is quick.

    Args:
        known: results by what they depend on; a sweep's runs mostly have the same data.
        trains_on_rows: read `data.train`, which a replay does not train on.

    Raises:
        ConfigError: with all problems.
    """
    rollout, known = config.rollout, {} if known is None else known
    imitates = rollout.on_policy_fraction < 1 and rollout.off_policy is OffPolicy.dataset
    inputs = repr((config.data, imitates, config.eval.max_samples, config.checkpoint.metric, trains_on_rows))
    if inputs not in known:
        known[inputs] = _check(config, trains_on_rows=trains_on_rows, imitates=imitates)
    return known[inputs]


def _check(config: Config, *, trains_on_rows: bool, imitates: bool) -> DataFacts:
    data, problems, warnings = config.data, list[str](), list[str]()
    train: Sequence[Example] | Stream = ()
    validation: Sequence[Example] | Stream = ()

    @contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.extend(error.problems)

    with collected():
        if data.train and trains_on_rows:
            train = load_examples(data.train, key="data.train", context=data.teacher_context)
    with collected():
        if data.validation:
            validation = load_examples(data.validation, key="data.validation")
    with collected():
        sample, hashes = _read_training(config, train, warnings, imitates=imitates)
        _read_validation(config, validation, hashes, warnings)
    if problems:
        raise ConfigError(*problems)
    num_train, num_validation = (None if isinstance(rows, Stream) else len(rows) for rows in (train, validation))
    return DataFacts(num_train, num_validation, sample, tuple(warnings))


def _read_training(
    config: Config, train: Sequence[Example] | Stream, warnings: list[str], *, imitates: bool
) -> tuple[Example | None, set[bytes]]:
    """Return the first row with a question, and hashes of all that were read."""
    sample: Example | None = None
    hashes, num_rows, num, lacks = set[bytes](), 0, 0, Counter[str]()
    rows = islice(train, STREAMED_ROWS_READ if isinstance(train, Stream) else MOST_ROWS_READ)
    for example in rows:
        num_rows += 1
        if example.question.strip():
            num, sample = num + 1, sample or example
            hashes.add(_hash(example))
            lacks.update(answer=example.answer is None, context=example.context is None, response=not example.response)
    _check_questions("data.train", num, num_rows, warnings)
    if imitates and lacks["response"]:
        raise ConfigError(
            f"data.train: {lacks['response']} of {num} rows have no whole answer to imitate (rollout.off_policy="
            "dataset); give data.train.response_key and rows that have one, or choose rollout.off_policy=teacher"
        )
    if config.data.teacher_context is not None and lacks["context"]:
        what = f"data.teacher_context={config.data.teacher_context}"
        if lacks["context"] == num:
            raise ConfigError(f"{what}: none of {num} rows of data.train has a text there; is it the right column?")
        warnings.append(
            f"data.train: {lacks['context']} of {num} rows have no {what}: the teacher reads the student's prompt"
        )
    if config.data.verifier is not None and lacks["answer"] and config.data.train.get("answer_key", "") is not None:
        warnings.append(f"data.train: {lacks['answer']} of {num} rows have no answer: rollout/accuracy leaves them out")
    return sample, hashes


def _read_validation(
    config: Config, validation: Sequence[Example] | Stream, trained: set[bytes], warnings: list[str]
) -> None:
    rows = list(islice(validation, config.eval.max_samples if isinstance(validation, Stream) else None))
    num_unanswered = sum(example.answer is None for example in rows)
    if num_unanswered and config.data.verifier is not None:
        raise ConfigError(
            f"data.validation: {num_unanswered} of {len(rows)} rows have no answer to check; give "
            "data.validation.answer_key (and answer_from, if the column holds more), or rows that have one"
        )
    questions = [example for example in rows if example.question.strip()]
    _check_questions("data.validation", len(questions), len(rows), warnings)
    _check_ranked_dataset(config.checkpoint.metric, {example.dataset for example in rows})
    in_both = len({_hash(example) for example in questions} & trained)
    if in_both:
        warnings.append(f"{in_both} prompts of data.validation are in data.train too: its scores mean less")


def _check_questions(key: str, number: int, num_rows: int, warnings: list[str]) -> None:
    if num_rows and not number:
        raise ConfigError(f"{key}: none of {num_rows} rows has a question; is it the right column?")
    if number < num_rows:
        warnings.append(f"{key}: {num_rows - number} of {num_rows} rows have no question and are left out")


def _check_ranked_dataset(metric: str, datasets: set[str]) -> None:
    """Raise ConfigError if checkpoint.metric is the accuracy on a dataset that validation does not report."""
    declared = find(metric)
    if declared is None or declared.name != "val/<dataset>/accuracy":
        return
    scores = [f"val/{dataset}/accuracy" for dataset in sorted(datasets)] if len(datasets) > 1 else []
    if metric not in scores:
        choices = ", ".join(["val/accuracy", *scores])
        raise ConfigError(f"checkpoint.metric={metric}: not a dataset of data.validation; choose one of {choices}")


def _hash(example: Example) -> bytes:
    """Return sixteen bytes for the beginnings of the messages, blanks aside, in little memory for a long row."""
    earlier = [message["content"][:CHARACTERS_READ] for message in example.messages[:-1]]
    text = "\n".join([*earlier, example.question[:CHARACTERS_READ]])
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
