"""What is said of the data before anything starts, and validation sets that can only be read from their beginning."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config, MeshConfig
from distill_cli.data.check import check_data
from distill_cli.data.registry import load_examples
from distill_cli.evaluate import Validator
from distill_cli.jobs.tracking import mlflow_target
from distill_cli.modelpath import ASSETS
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.preflight import preflight
from distill_cli.ranks.prompts import build_validator
from distill_cli.rundir import RunDir
from distill_cli.types import Sample


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(MeshConfig(), device=torch.device("cpu"))
    dist.destroy_process_group()


def rows_file(folder: Path, name: str, questions: list[str]) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps({"question": one, "answer": "2"}) + "\n" for one in questions))
    return file


def composed(*argv: str) -> Config:
    (job,) = compose(argv)
    return job.config


def test_prompts_that_are_in_both_sets_are_counted(tmp_path: Path) -> None:
    train = rows_file(tmp_path, "train.jsonl", [f"What is {i} + 1?" for i in range(80)])
    validation = rows_file(tmp_path, "validation.jsonl", ["What is  3 + 1? ", "What is 4 + 1?", "What is 400 + 1?"])
    config = composed("data=jsonl", f"data.train.path={train}", f"data.validation.path={validation}")
    assert check_data(config).warnings == (
        "2 prompts of data.validation are in data.train too: its scores say less for that",
    )
    config.data.validation["path"] = str(rows_file(tmp_path, "other.jsonl", ["What is 400 + 1?"]))
    assert check_data(config).warnings == ()


class Teller:
    """Answers what it was asked: the prompt's tokens."""

    tensor_parallel = 1

    def sample(self, prompts, *, seeds, sampling) -> list[Sample]:
        return [Sample(list(ids), [0.0] * len(ids), "stop") for ids in prompts]


def validator_of(config: Config, parallel: Parallel) -> Validator:
    return build_validator(config, parallel, AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student"))


def test_streams_validate_by_their_first_rows(tmp_path: Path, parallel: Parallel) -> None:
    """`data.train.streaming` as it is typed, though the file of the group does not set it."""
    file = rows_file(tmp_path, "rows.jsonl", [f"What is {i} + 1?" for i in range(80)])
    streamed = [f"data.{part}.{key}" for part in ("train", "validation") for key in (f"path={file}", "streaming=true")]
    config = composed(
        "data=table", "data.verifier=exact", *streamed, "data.validation.split=train", "eval.max_samples=7"
    )
    found = preflight(config)
    assert (found.num_train, found.num_validation, found.num_steps(config)) == (None, None, 100)
    validator = validator_of(config, parallel)
    assert [prompt.index for prompt in validator.prompts] == list(range(7))
    assert validator.run(Teller()).num_samples == 7
    (training, _) = mlflow_target(config, RunDir(tmp_path)).datasets
    assert training.profile()[1] == {}  # nobody knows how many there are
    load_examples(config.data.train, key="data.train")


def test_several_datasets_are_validated_each(tmp_path: Path, parallel: Parallel) -> None:
    files = {name: rows_file(tmp_path, f"{name}.jsonl", [f"{name} {i}?" for i in range(9)]) for name in ("a", "b")}
    sources = ", ".join(f"{name}: {{source: table, path: '{file}'}}" for name, file in files.items())
    config = composed("data=mix", f"data.validation.sources={{{sources}}}", "data.verifier=exact", "eval.max_samples=4")
    config.data.validation["sources"] = {name: config.data.validation["sources"][name] for name in files}
    score = validator_of(config, parallel).run(Teller())
    assert score.num_samples == 8
    assert score.metrics().keys() >= {"val/a/accuracy", "val/b/accuracy"}


def test_the_teacher_is_validated_on_prompts_as_it_reads_them(parallel: Parallel) -> None:
    template = "{% for m in messages %}TEACHER {{ m.content }}{% endfor %}"
    config = composed("eval.max_samples=3")
    config.model.teacher.chat_template = template
    validator = validator_of(config, parallel)
    asked: list[str] = []

    class Listening(Teller):
        def sample(self, prompts, *, seeds, sampling) -> list[Sample]:
            asked.extend(validator.decode(ids) for ids in prompts)
            return super().sample(prompts, seeds=seeds, sampling=sampling)

    validator.run(Listening(), as_teacher=True)
    validator.run(Listening())
    assert all(text.startswith("TEACHER What is") for text in asked[:3])
    assert not any("TEACHER" in text for text in asked[3:])
