"""Teachers with a tokenizer of their own, before an engine starts: the verdict, and what is refused."""

import json
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.derived import max_teacher_prompt_tokens, scored_length
from distill_cli.jobs.plan_tables import run_rows
from distill_cli.jobs.preflight import preflight
from tests.jobs.problems import FEW_RANKS, MakeModel, pair, problems_of

OTHER = "package://tiny_pair/other_teacher"


def test_the_verdict_is_in_the_plan() -> None:
    (job,) = compose(["model=tiny_other"])
    found = preflight(job.config)
    text = run_rows(found)["teacher's tokenizer"]
    assert text is not None
    assert text.startswith("its own; of a sample ")
    assert "% of its tokens are the student's" in text
    assert found.vocabulary.size == 512
    assert found.vocabulary.merged_eos_ids == ()
    alone = found.by_teacher()["teacher"]
    assert (alone.vocabulary.size, alone.vocabulary.limit) == (561, None)


def test_the_teacher_may_need_more_tokens() -> None:
    (job,), (shared,) = compose(["model=tiny_other"]), compose([])
    assert max_teacher_prompt_tokens(job.config) == 2 * max_teacher_prompt_tokens(shared.config)
    assert scored_length(job.config) > scored_length(shared.config)
    assert preflight(job.config).lengths.teacher <= 512  # its positions
    (short,) = compose(["model=tiny_other", "engine.teacher.max_model_len=40"])  # what is longer is left out
    lengths = preflight(short.config).lengths
    assert (lengths.teacher, lengths.teacher_prompt) == (40, 39)


def test_other_tokens_need_to_be_asked_for() -> None:
    problems = problems_of(f"model.teacher.path={OTHER}")
    assert "its vocabulary is not the student's" in problems
    assert "set model.teacher.tokenizer=own" in problems


def test_bad_combinations_are_refused() -> None:
    assert "model.teacher.tokenizer=own: model.teacher.path=student has the student's; leave it out" in problems_of(
        "model.teacher.path=student", "model.teacher.tokenizer=own", "data.teacher_context=solution"
    )
    assert "leave out rollout.environment" in problems_of(
        "model=tiny_other", "rollout.environment=calculator", "rollout.max_turns=2"
    )
    assert "loss.alignment=rank: compares the teacher's top-k" in problems_of(
        "model=tiny_other", "loss=uld", "loss.support=full"
    )
    assert "loss.policy_gradient=1.0: needs the teacher's probability" in problems_of(
        "model=tiny_other", "loss=uld", "loss.policy_gradient=1"
    )
    assert "loss.topk=600: must be at most" in problems_of("model=tiny_other", "loss.topk=600")


def test_own_templates_render_the_first_row(make_model: MakeModel) -> None:
    """Some refuse a system prompt, and that is said before an engine starts."""
    source = Path(__file__).parents[2] / "distill_cli/assets/tiny_pair/student/tokenizer.json"
    student, teacher = make_model("s"), make_model("t")
    for folder in (student, teacher):
        (folder / "tokenizer.json").write_text(source.read_text())
    (teacher / "chat_template.jinja").write_text(
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    )
    given = [*pair(student, teacher), *FEW_RANKS, "model.teacher.tokenizer=own"]
    problems = problems_of(*given, "data.system_prompt=be brief")
    assert f"model.teacher.path={teacher}: its chat template fails on the first row" in problems
    assert "no system role" in problems
    (job,) = compose(given)
    preflight(job.config)


def test_a_shorter_teacher_is_warned_of() -> None:
    warned = "reads 100 tokens, and the student's sequences have up to 128: what is beyond has no loss"
    (short,) = compose(["model=tiny_other", "engine.teacher.max_model_len=100"])
    assert warned in " ".join(preflight(short.config).warnings)
    (long,) = compose(["model=tiny_other"])
    assert "no loss" not in " ".join(preflight(long.config).warnings)


def test_given_templates_print_the_teachers_tokens(make_model: MakeModel) -> None:
    source = Path(__file__).parents[2] / "distill_cli/assets/tiny_pair/student/tokenizer.json"
    student, teacher = make_model("s"), make_model("t")
    for folder in (student, teacher):
        (folder / "tokenizer.json").write_text(source.read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>"}))
    template = teacher / "given.jinja"
    template.write_text("{{ raise_exception('no begin') if bos_token != '<begin>' }}{{ messages[0].content }}")
    given = [*pair(student, teacher), *FEW_RANKS, f"model.teacher.chat_template={template}"]
    (job,) = compose([*given, "model.teacher.tokenizer=own"])
    preflight(job.config)
    assert "no begin" in problems_of(*given)


def test_a_row_has_one_teacher(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "answer": "2", "who": ["a", "b"]}] * 64
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = problems_of(
        "model.teachers.a.path=package://tiny_pair/teacher",
        f"model.teachers.b.path={OTHER}",
        "model.teachers.b.tokenizer=own",
        "data=jsonl",
        f"data.train.path={tmp_path / 'train.jsonl'}",
        "data.validation=null",
        "data.teacher_key=who",
    )
    assert "mixes teachers, which need the student's tokenizer; b has its own" in problems


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read as a tokenizer"),
        ("{", "cannot be read as a tokenizer"),
        ('{"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []}', "cannot be read as bytes"),
    ],
)
def test_unreadable_tokenizers_are_named(make_model: MakeModel, content: str | None, problem: str) -> None:
    student, teacher = make_model("s"), make_model("t")
    file = teacher / "tokenizer.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    source = Path(__file__).parents[2] / "distill_cli/assets/tiny_pair/student/tokenizer.json"
    (student / "tokenizer.json").write_text(source.read_text())
    found = problems_of(*pair(student, teacher), *FEW_RANKS, "model.teacher.tokenizer=own")
    assert problem in found
    assert str(teacher) in found
