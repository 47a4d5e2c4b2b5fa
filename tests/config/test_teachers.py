"""Several teachers in a config: what each inherits, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config, Dtype
from distill_cli.config.teachers import teacher_configs, teacher_names
from distill_cli.config.variation import forbidden_changes, load_config, override, save_config
from distill_cli.errors import ConfigError
from distill_cli.jobs.preflight import preflight
from distill_cli.models.model_files import ASSETS

A, B = "model.teachers.a.path=package://tiny_pair/teacher", "model.teachers.b.path=package://tiny_pair/student"


def composed(*argv: str) -> Config:
    (job,) = compose(argv)
    return job.config


def test_each_teacher_has_its_own_config(tmp_path: Path) -> None:
    config = composed(A, B, "model.teachers.b.loss.kl_type=reverse", "model.teachers.b.dtype=bfloat16", "loss.topk=9")
    config = override(config, ["model.teachers.a.engine.kv_cache_gib=0.5"])
    save_config(config, tmp_path / "config.yaml")
    for found in (config, load_config(tmp_path / "config.yaml")):
        a, b = teacher_configs(found).values()
        assert teacher_names(found) == ("a", "b")
        assert (a.model.teacher.path, b.model.teacher.path) == (
            "package://tiny_pair/teacher",
            "package://tiny_pair/student",
        )
        assert (a.model.teacher.dtype, b.model.teacher.dtype) == (Dtype.float32, Dtype.bfloat16)
        assert (a.loss.kl_type, b.loss.kl_type, b.loss.topk) == ("mixed", "reverse", 9)
        caches = (a.engine.teacher.kv_cache_gib, b.engine.teacher.kv_cache_gib)
        assert caches == (0.5, config.engine.teacher.kv_cache_gib)
        assert a.model.teachers == {}


def test_one_teacher_is_the_config_itself() -> None:
    config = composed()
    assert teacher_configs(config) == {"teacher": config}


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("model.teachers.a.loss.kl_typ=reverse", "model.teachers.a.loss.kl_typ: unknown key"),
        ("model.teachers.a.dtype=float8", "model.teachers.a.dtype=float8"),
        ("model.teachers.a.loss.topk=8", "model.teachers.a.loss.topk=8: all teachers have one loss.topk"),
        ("model.teachers.a.data.train={}", "model.teachers.a.data.train: a teacher's own keys of data are"),
        ("model.teachers.a.loss.temperature=0", "model.teachers.a: loss.temperature=0.0: must be above 0"),
        ("model.teachers.a.loss.kl_type=sideways", "loss.kl_type=sideways: must be one of"),
        ("model.teachers.c=5", "model.teachers.c=5: must be the keys of a teacher"),
        ("model.teachers.c/d.path=x", "model.teachers.c/d"),
        ("model.teachers.c.path=/no/such/folder", "model.teachers.c.path=/no/such/folder"),
        ("model.teachers.a.engine.tensor_parallel=3", "model.teachers.a.engine.tensor_parallel=3"),
        ("data.teacher_key=whose", "data.teacher_key=whose: the source arithmetic has no teacher_key"),
        ("eval.repeat=1", "data.train: row 0 is of '', which is no teacher; they are a, b"),
    ],
)
def test_mistakes_name_key_and_teacher(typed: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        preflight(composed(A, B, typed))
    assert any(line.startswith(problem) or problem in line for line in refused.value.problems), refused.value.problems


def test_resume_refuses_another_teacher_under_a_name() -> None:
    before = composed(A, B)
    for typed, is_refused in {
        "model.teachers.a.path=package://tiny_pair/student": True,
        "model.teachers.c.path=package://tiny_pair/student": True,
        "model.teachers.a.loss.kl_type=reverse": True,
        "model.teachers.a.engine.kv_cache_gib=0.5": False,
    }.items():
        changes = list(forbidden_changes(before, override(before, [typed]), unless="resume"))
        assert bool(changes) == is_refused, typed


def test_other_vocabulary_names_teacher_and_token(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(ASSETS / "tiny_pair/teacher", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    routed = ["data=sources", "data.verifier=exact", "data.validation=null", "eval.record_samples=0"]
    one = "{source: arithmetic, split: train, size: 64, seed: 0}"
    typed = [A, f"model.teachers.b.path={folder}", *routed, f"data.train.sources={{a: {one}, b: {one}}}"]
    with pytest.raises(ConfigError) as refused:
        preflight(composed(*typed))
    (problem,) = refused.value.problems
    assert problem.startswith(f"model.teachers.b.path={folder}: its vocabulary is not the student's")
    assert f"2 tokens have different ids, such as 'a' ({vocab['b']} and {vocab['a']})" in problem
