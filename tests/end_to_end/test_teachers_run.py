"""A run with two teachers: each scores its rows, with its own loss and template, and mixtures of both theirs."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from distill_cli.data.sources.arithmetic import load
from distill_cli.models.model_files import ASSETS
from tests.end_to_end.conftest import SHORT, Finished, distill
from tests.end_to_end.naive import check_numbers

ASKED = ["right", "careless", {"right": 3, "careless": 1}, ["careless", "right"]]
"""What the rows ask for in turn."""
TEACHERS = (
    *("model.teachers.right.path=package://tiny_pair/teacher", "model.teachers.right.loss.kl_weight=0.9"),
    *("model.teachers.careless.path=package://tiny_pair/student", "data.teacher_key=whose"),
    "model.teachers.careless.chat_template='Q: {{ messages[0].content }}'",
)
OFF = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("teachers")
    rows = [
        {"question": row.question, "answer": row.answer, "whose": ASKED[number % len(ASKED)]}
        for number, row in enumerate(load(split="train", size=64, seed=0))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("data=jsonl", "data.train.path=rows.jsonl", "data.validation=null", "rollout.save_scores=true")
    return distill(folder, *SHORT[1:], *data, *TEACHERS, *OFF, "train.max_steps=2", "cluster.ranks_per_node=2")


def as_question(prompt: list[int]) -> list[int]:
    """The prompt of the teacher with a template of its own where this is the student's."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")
    question = tokenizer.decode(prompt).split("user\n")[1].split("<|im_end|>")[0]
    return tokenizer.encode(f"Q: {question}", add_special_tokens=False)


@pytest.mark.slow
def test_numbers_are_the_references(finished: Finished) -> None:
    assert finished.status == 0, finished.stdout + finished.stderr
    check_numbers(finished, steps=2, read_by_teacher={"right": list, "careless": as_question})
    names = {name for row in finished.metrics for name in row if name.startswith("teacher/")}
    assert {name.split("/")[1] for name in names} == {"right", "careless", "right+careless"}
    assert 0 < finished.metrics[-1]["train/mixture_uncertainty"] < 0.2


@pytest.mark.slow
def test_replay_keeps_teachers(finished: Finished) -> None:
    done = distill(finished.folder, "replay", "runs/latest", "train.max_steps=1", "run.name=again", *OFF)
    assert done.status == 0, done.stdout + done.stderr
    first, again = finished.metrics[1], done.metrics[-1]
    same = [name for name in first if name.startswith("teacher/") and not name.endswith("accuracy")]
    assert same
    assert {name: again[name] for name in same} == pytest.approx({name: first[name] for name in same}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_resume_refuses_other_weights(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(ASSETS / "tiny_pair/teacher", folder)
    argv = ("model.teachers.one.path=./teacher", "train.max_steps=1", "run.name=run")
    done = distill(tmp_path, *SHORT[1:], *OFF, "eval.record_samples=0", *argv)
    assert done.status == 0, done.stdout + done.stderr
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    done = distill(tmp_path, "resume", "runs/run", "train.max_steps=2")
    assert done.status in (1, 2)
    assert "model.teachers.one: ./teacher: its weights are not those that the run began with" in done.stderr


def test_unknown_teacher_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2", "whose": "wrong"}\n' * 64)
    argv = ("data=jsonl", "data.train.path=rows.jsonl", "data.validation=null", *TEACHERS, *OFF)
    done = distill(tmp_path, *argv)
    assert done.status == 2
    assert done.stderr == (
        "error: data.teacher_key=whose: row 0 of data.train asks for 'wrong'; the teachers are right, careless\n"
    )
