"""Checks of the data before anything starts, and validation on streams."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.data.registry import load_examples
from distill_cli.data.row_check import _check_ranked_dataset, _hash, check_data
from distill_cli.engines.base import AnsweringEngine
from distill_cli.errors import ConfigError
from distill_cli.jobs.preflight import preflight, preflight_evaluation
from distill_cli.models.model_files import ASSETS
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.ranks.build_source import Rank, build_validator
from distill_cli.track.facts import data_profile
from distill_cli.train.validation import Validator
from distill_cli.types import Example, Sample


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(device=torch.device("cpu"))
    dist.destroy_process_group()


def rows_file(folder: Path, name: str, questions: list[str]) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps({"question": one, "answer": "2"}) + "\n" for one in questions))
    return file


def composed(*argv: str) -> Config:
    (job,) = compose(argv)
    return job.config


def test_prompts_in_both_sets_are_counted(tmp_path: Path) -> None:
    train = rows_file(tmp_path, "train.jsonl", [f"What is {i} + 1?" for i in range(80)])
    validation = rows_file(tmp_path, "validation.jsonl", ["What is  3 + 1? ", "What is 4 + 1?", "What is 400 + 1?"])
    config = composed("data=jsonl", f"data.train.path={train}", f"data.validation.path={validation}")
    (warning,) = check_data(config).warnings
    assert warning.startswith("2 prompts of data.validation are in data.train")
    config.data.validation["path"] = str(rows_file(tmp_path, "other.jsonl", ["What is 400 + 1?"]))
    assert check_data(config).warnings == ()


def test_rows_without_needed_columns_are_counted(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.jsonl", rows_file(tmp_path, "validation.jsonl", ["What is 400 + 1?"])
    rows = [
        {"question": f"{i}?", "answer": None if i % 4 == 0 else 1, "hint": ["h", "", " ", None][i % 4]}
        for i in range(80)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["data=jsonl", f"data.train.path={train}", f"data.validation.path={validation}"]
    context, answers = check_data(composed(*argv, "data.teacher_context=hint")).warnings
    assert context.startswith("data.train: 60 of 80 rows have no data.teacher_context=hint")
    assert answers.startswith("data.train: 20 of 80 rows have no answer")
    train.write_text("".join(json.dumps({**row, "hint": ""}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="data.teacher_context=hint: none of 80 rows of data.train"):
        check_data(composed(*argv, "data.teacher_context=hint"))


def test_solutions_may_lack_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    solutions = ["so #### 4", "so 4", "#### 5"] * 30
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": s}) + "\n" for i, s in enumerate(solutions)))
    argv = ["data=gsm8k", f"data.train.path={file}"]
    (warning,) = check_data(composed(*argv, "data.validation=null")).warnings
    assert warning.startswith("data.train: 30 of 90 rows have no answer")
    with pytest.raises(ConfigError, match="data.validation: 30 of 90 rows have no answer to check"):
        check_data(composed(*argv, f"data.validation.path={file}"))


def test_long_rows_are_hashed_cheaply(tmp_path: Path) -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    example = Example("What is 1 + 1? " * 3_500_000)
    tracemalloc.start()
    _hash(example)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert _hash(Example("a  b\n")) == _hash(Example("a b")) != _hash(Example("a c"))


class Echo(AnsweringEngine):
    """Answer with the prompt's tokens."""

    num_ranks = 1

    def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
        return [Sample(list(ids), [0.0] * len(ids), "stop") for ids in prompts]


def validator_of(config: Config, parallel: Parallel) -> Validator:
    found = preflight_evaluation(override(config, {"data.train": {}}), role="student")
    return build_validator(Rank(found, parallel, AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")))


def test_streams_validate_by_their_first_rows(tmp_path: Path, parallel: Parallel) -> None:
    """`data.train.streaming` as it is typed, though the file of the group does not set it."""
    file = rows_file(tmp_path, "rows.jsonl", [f"What is {i} + 1?" for i in range(80)])
    streamed = [f"data.{part}.{key}" for part in ("train", "validation") for key in (f"path={file}", "streaming=true")]
    config = composed(
        "data=table", "data.verifier=exact", *streamed, "data.validation.split=train", "eval.max_samples=7"
    )
    found = preflight(config)
    assert (found.num_train_rows, found.num_validation_rows, found.num_steps) == (None, None, 100)
    validator = validator_of(config, parallel)
    assert [prompt.index for prompt in validator.prompts] == list(range(7))
    assert validator.run(Echo()).num_samples == 7
    assert data_profile(config.data.train, key="data.train")[1] == {}  # nobody knows how many there are
    load_examples(config.data.train, key="data.train")


def test_several_datasets_are_validated_each(tmp_path: Path, parallel: Parallel) -> None:
    files = {name: rows_file(tmp_path, f"{name}.jsonl", [f"{name} {i}?" for i in range(9)]) for name in ("a", "b")}
    sources = ", ".join(f"{name}: {{source: table, path: '{file}'}}" for name, file in files.items())
    config = composed("data=mix", f"data.validation.sources={{{sources}}}", "data.verifier=exact", "eval.max_samples=4")
    config.data.validation["sources"] = {name: config.data.validation["sources"][name] for name in files}
    score = validator_of(config, parallel).run(Echo())
    assert score.num_samples == 8
    assert score.metrics().keys() >= {"val/a/accuracy", "val/b/accuracy"}


def test_ranking_by_a_dataset_needs_it() -> None:
    _check_ranked_dataset("val/a/accuracy", {"a", "b"})
    with pytest.raises(ConfigError, match="val/c/accuracy: .*val/accuracy, val/a/accuracy, val/b/accuracy"):
        _check_ranked_dataset("val/c/accuracy", {"a", "b"})
    with pytest.raises(ConfigError, match="choose one of val/accuracy$"):
        check_data(composed("checkpoint.metric=val/arithmetic/accuracy"))


def test_teacher_is_validated_on_own_prompts(parallel: Parallel) -> None:
    template = "{% for m in messages %}TEACHER {{ m.content }}{% endfor %}"
    config = composed("eval.max_samples=3")
    config = override(config, {"model.teacher.chat_template": template})
    validator = validator_of(config, parallel)
    texts: list[str] = []

    class Recording(Echo):
        def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
            texts.extend(validator.responder.decode(ids) for ids in prompts)
            return super().sample(prompts, seeds=seeds, sampling=sampling)

    validator.for_teacher(0).run(Recording())
    validator.run(Recording())
    assert all(text.startswith("TEACHER What is") for text in texts[:3])
    assert not any("TEACHER" in text for text in texts[3:])
