"""Check the data before anything starts: rows without a question or an answer, prompts in both sets. No torch."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from distill_cli.config.derived import needs_hidden
from distill_cli.config.schema import Config, OffPolicy
from distill_cli.config.teachers import model_key, own_temperatures, teacher_configs, teacher_names
from distill_cli.data.registry import load_examples
from distill_cli.data.routing import asked_for, route
from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError, collect
from distill_cli.metrics import find
from distill_cli.types import Example

MOST_ROWS_READ = 100_000
"""Rows of the training data that are read; the rest is assumed to be like them."""
STREAMED_ROWS_READ = 100
"""Likewise for a stream, each of whose rows may have to be downloaded."""
CHARACTERS_READ = 20_000
"""Characters of a message that are compared: messages that begin with the same ones count as the same."""


Found = tuple[int | None, set[bytes], Example | None]
"""The number of rows (None for a stream), hashes of those that were read, and the first one."""


@dataclass(frozen=True)
class DataFacts:
    """What `check_data` finds."""

    num_train: int | None = 0
    """Rows; None for a stream."""
    num_validation: int | None = 0
    sample: Example | None = None
    """The first training row with a question."""
    warnings: tuple[str, ...] = ()


KnownData = dict[str, DataFacts]
"""Facts by what they depend on; a sweep's runs mostly have the same data."""


def check_data(config: Config, known: KnownData | None = None, *, trains_on_rows: bool = True) -> DataFacts:
    """Read the data, as far as that is quick.

    Args:
        known: results of earlier calls, which are added to.
        trains_on_rows: read `data.train`, which a replay does not train on.

    Raises:
        ConfigError: with all problems.
    """
    rollout, known = config.rollout, {} if known is None else known
    imitates = rollout.on_policy_fraction < 1 and rollout.off_policy is OffPolicy.dataset
    teachers: object = None
    if config.model.teachers:
        own = [one.model.teacher.tokenizer for one in teacher_configs(config).values()]
        teachers = teacher_names(config), own_temperatures(config), own
    inputs = repr((config.data, teachers, imitates, config.eval.max_samples, config.checkpoint.metric, trains_on_rows))
    if inputs in known:
        return known[inputs]
    warnings: list[str] = []
    (num_train, trained, sample), (num_validation, held_out, _) = collect([
        lambda: _read_training(config, warnings, trains_on_rows=trains_on_rows, imitates=imitates),
        lambda: _read_validation(config, warnings),
    ])  # fmt: skip
    if in_both := len(held_out & trained):
        warnings.append(f"{in_both} prompts of data.validation are in data.train too: its scores mean less")
    known[inputs] = DataFacts(num_train, num_validation, sample, tuple(warnings))
    return known[inputs]


def _read_training(config: Config, warnings: list[str], *, trains_on_rows: bool, imitates: bool) -> Found:
    data, hashes, num, lacks = config.data, set[bytes](), 0, Counter[str]()
    sample: Example | None = None
    reads = data.train and trains_on_rows
    columns = {"context": data.teacher_context, "teacher": data.teacher_key}
    train = load_examples(data.train, key="data.train", **columns) if reads else ()
    routing = Routing(config)
    rows = islice(train, STREAMED_ROWS_READ if isinstance(train, Stream) else MOST_ROWS_READ)
    for example in _with_question(rows, "data.train", warnings):
        num += 1
        sample = sample or example
        hashes.add(_hash(example))
        routing.add(example, place=num - 1)
        lacks.update(answer=example.answer is None, context=example.context is None, response=not example.response)
    if imitates and lacks["response"]:
        raise ConfigError(
            f"data.train: {lacks['response']} of {num} rows have no whole answer to imitate (rollout.off_policy="
            "dataset); give data.train.response_key and rows that have one, or choose rollout.off_policy=teacher"
        )
    if data.teacher_context is not None and lacks["context"]:
        what = f"data.teacher_context={data.teacher_context}"
        if lacks["context"] == num:
            raise ConfigError(f"{what}: none of {num} rows of data.train has a text there; is it the right column?")
        warnings.append(
            f"data.train: {lacks['context']} of {num} rows have no {what}: the teacher reads the student's prompt"
        )
    if data.verifier is not None and lacks["answer"] and data.train.get("answer_key", "") is not None:
        warnings.append(f"data.train: {lacks['answer']} of {num} rows have no answer: rollout/accuracy leaves them out")
    if num:
        warnings += routing.warnings(num)
    return None if isinstance(train, Stream) else len(train), hashes, sample


class Routing:
    """Count the rows of each teacher, if there are several. Raises ConfigError at the first row of an unknown one."""

    def __init__(self, config: Config) -> None:
        self._names, self._key = teacher_names(config), config.data.teacher_key
        self._temperatures = own_temperatures(config) if len(self._names) > 1 else {}
        self._needs_hidden = needs_hidden(config)
        alone = teacher_configs(config).items()
        self._own_tokenizers = [name for name, one in alone if one.model.teacher.has_own_tokenizer]
        self._counts = Counter[int]()

    def add(self, example: Example, *, place: int) -> None:
        """Take the row at `place` among those with a question."""
        weights, names = route(example, self._names), ", ".join(self._names)
        self._counts.update(list(weights))
        if not weights and self._key is not None:
            what = f"data.teacher_key={self._key}: row {place} of data.train asks for {asked_for(example)}"
            raise ConfigError(f"{what}; the teachers are {names}")
        if not weights:
            what = f"data.train: row {place} is of {asked_for(example)}, which is no teacher; they are {names}"
            fix = "give data.teacher_key, the column that says whose a row is, or name the sources of data=mix so"
            raise ConfigError(f"{what}; {fix}")
        if len(weights) > 1 and self._temperatures:
            what = f"data.train: row {place} mixes teachers, which need one temperature"
            raise ConfigError(f"{what}; leave out model.teachers.{next(iter(self._temperatures))}.loss.temperature")
        if len(weights) > 1 and self._needs_hidden:
            what = f"data.train: row {place} mixes teachers, which is done with their top-k"
            raise ConfigError(f"{what}; set loss.support=teacher, and no rollout.save_scores=hidden")

        if len(weights) > 1 and self._own_tokenizers:
            what = f"data.train: row {place} mixes teachers, which need the student's tokenizer"
            raise ConfigError(f"{what}; {self._own_tokenizers[0]} has its own: give each row one teacher")

    def warnings(self, num: int) -> list[str]:
        """Return a warning for each teacher without a row, of `num`."""
        idle = [name for index, name in enumerate(self._names) if not self._counts[index]]
        return [f"{model_key(name)}: none of {num} rows of data.train is this teacher's" for name in idle]


def _read_validation(config: Config, warnings: list[str]) -> Found:
    data = config.data
    validation = load_examples(data.validation, key="data.validation") if data.validation else ()
    rows = list(islice(validation, config.eval.max_samples if isinstance(validation, Stream) else None))
    num_unanswered = sum(example.answer is None for example in rows)
    if num_unanswered and data.verifier is not None:
        raise ConfigError(
            f"data.validation: {num_unanswered} of {len(rows)} rows have no answer to check; give "
            "data.validation.answer_key (and answer_from, if the column holds more), or rows that have one"
        )
    hashes = {_hash(example) for example in _with_question(rows, "data.validation", warnings)}
    _check_ranked_dataset(config.checkpoint.metric, {example.dataset for example in rows})
    return None if isinstance(validation, Stream) else len(validation), hashes, None


def _with_question(rows: Iterable[Example], key: str, warnings: list[str]) -> Iterator[Example]:
    """Yield the rows with a question, and warn of the others. Raises ConfigError if no row has one."""
    num_blank, num_rows = 0, 0
    for example in rows:
        num_rows += 1
        if example.question.strip():
            yield example
        else:
            num_blank += 1
    if num_rows and num_blank == num_rows:
        raise ConfigError(f"{key}: none of {num_rows} rows has a question; is it the right column?")
    if num_blank:
        warnings.append(f"{key}: {num_blank} of {num_rows} rows have no question and are left out")


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
