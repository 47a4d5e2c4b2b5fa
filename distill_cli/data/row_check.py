"""What can be said of the data before anything starts: rows, those that ask nothing, those in both sets. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from distill_cli.config.schema import Config, OffPolicy
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError
from distill_cli.metrics import find
from distill_cli.types import Example

MOST_ROWS_READ = 100_000
"""Of the training data; the rest is taken to be like them."""
STREAMED_ROWS_READ = 100
"""Of a stream: each may have to be downloaded."""

CHARACTERS_READ = 20_000
"""Of a message: those that are the same so far are taken for the same."""


@dataclass(frozen=True)
class DataFacts:
    """What `check_data` found."""

    num_train: int | None = 0
    """Rows; None of a stream."""
    num_validation: int | None = 0
    sample: Example | None = None
    """The first training row that asks something."""
    warnings: tuple[str, ...] = ()


def check_data(config: Config, known: dict[str, DataFacts] | None = None) -> DataFacts:
    """Reads the data, as far as that is quick.

    Args:
        known: what was found before, by what was asked; a sweep's runs mostly have the same data.

    Raises:
        ConfigError: with all problems.
    """
    rollout = config.rollout
    is_replay = rollout.replay is not None
    off_policy, metric = (rollout.on_policy_fraction, rollout.off_policy), config.checkpoint.metric
    asked_for = repr((config.data, off_policy, config.eval.max_samples, metric, is_replay))
    known = {} if known is None else known
    if asked_for not in known:
        known[asked_for] = _check(config)
    return known[asked_for]


def _check(config: Config) -> DataFacts:
    data, problems, warnings = config.data, [], []

    def load(key: str, context: str | None) -> Sequence[Example] | Stream:
        spec = getattr(data, key) if key == "validation" or config.rollout.replay is None else {}
        try:
            return load_examples(spec, key=f"data.{key}", context=context) if spec else []
        except ConfigError as error:
            problems.extend(error.problems)
            return []

    train, validation = load("train", data.teacher_context), load("validation", None)
    rollout, sample = config.rollout, None
    needs_responses = rollout.on_policy_fraction < 1 and rollout.off_policy is OffPolicy.dataset
    try:
        sample, asked = _read_training(config, train, warnings, needs_responses=needs_responses)
        _read_validation(config, validation, asked, warnings)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(*problems)
    return DataFacts(_size(train), _size(validation), sample, tuple(warnings))


def _read_training(
    config: Config, train: Sequence[Example] | Stream, warnings: list[str], *, needs_responses: bool
) -> tuple[Example | None, set[bytes]]:
    """The first row that asks something, and hashes of all that were read."""
    most = STREAMED_ROWS_READ if isinstance(train, Stream) else MOST_ROWS_READ
    sample, asked, num_rows, num_asked, lack = None, set(), 0, 0, Counter()
    for example in islice(train, most):
        num_rows += 1
        if not example.question.strip():
            continue
        num_asked += 1
        sample = sample or example
        asked.add(_hash(example))
        lack.update(
            {"answer": example.answer is None, "context": example.context is None, "response": not example.response}
        )
    if num_rows and sample is None:
        raise ConfigError(f"data.train: none of {num_rows} rows asks anything; is it the right column?")
    column, is_checked = config.data.teacher_context, config.data.verifier is not None
    if needs_responses and lack["response"]:
        raise ConfigError(
            f"data.train: {lack['response']} of {num_asked} rows have no whole answer to imitate, which "
            "rollout.off_policy=dataset needs; give data.train.response_key and rows that have one, or choose "
            "rollout.off_policy=teacher"
        )
    if column is not None and lack["context"] == num_asked > 0:
        raise ConfigError(
            f"data.teacher_context={column}: none of {num_asked} rows of data.train has anything in it; is it the "
            "right column?"
        )
    if num_asked < num_rows:
        warnings.append(f"data.train: {num_rows - num_asked} of {num_rows} rows ask nothing and are left out")
    if column is not None and lack["context"]:
        warnings.append(
            f"data.train: {lack['context']} of {num_asked} rows have nothing in data.teacher_context={column}: the "
            "teacher reads what the student does"
        )
    if is_checked and lack["answer"] and config.data.train.get("answer_key", "") is not None:
        warnings.append(
            f"data.train: {lack['answer']} of {num_asked} rows have no answer to check, and are not in rollout/accuracy"
        )
    return sample, asked


def _read_validation(
    config: Config, validation: Sequence[Example] | Stream, asked: set[bytes], warnings: list[str]
) -> None:
    rows = list(islice(validation, config.eval.max_samples) if isinstance(validation, Stream) else validation)
    num_unanswered = sum(example.answer is None for example in rows)
    if num_unanswered and config.data.verifier is not None:
        raise ConfigError(
            f"data.validation: {num_unanswered} of {len(rows)} rows have no answer to check; give "
            "data.validation.answer_key (and answer_from, where the column holds more than the answer), or rows that "
            "have one"
        )
    num_empty = sum(not example.question.strip() for example in rows)
    if rows and num_empty == len(rows):
        raise ConfigError(f"data.validation: none of {num_empty} rows asks anything; is it the right column?")
    if num_empty:
        warnings.append(f"data.validation: {num_empty} of {len(rows)} rows ask nothing and are left out")
    _check_ranked_dataset(config.checkpoint.metric, {example.dataset for example in rows})
    in_both = len({_hash(example) for example in rows if example.question.strip()} & asked)
    if in_both:
        warnings.append(f"{in_both} prompts of data.validation are in data.train too: its scores say less for that")


def _check_ranked_dataset(metric: str, datasets: set[str]) -> None:
    """Raise ConfigError if checkpoint.metric is the accuracy on a dataset that has none of its own in validation."""
    known = find(metric)
    if known is None or known.name != "val/<dataset>/accuracy":
        return
    scores = [f"val/{dataset}/accuracy" for dataset in sorted(datasets)] if len(datasets) > 1 else []
    if metric not in scores:
        choices = ", ".join(["val/accuracy", *scores])
        raise ConfigError(f"checkpoint.metric={metric}: not a dataset of data.validation; choose one of {choices}")


def _hash(example: Example) -> bytes:
    """Sixteen bytes for the beginning of what is asked, blanks aside: neither a large set nor a long row is held."""
    said = [message["content"][:CHARACTERS_READ] for message in example.messages[:-1]]
    text = "\n".join([*said, example.question[:CHARACTERS_READ]])
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def _size(rows: Sequence[Example] | Stream) -> int | None:
    return None if isinstance(rows, Stream) else len(rows)
