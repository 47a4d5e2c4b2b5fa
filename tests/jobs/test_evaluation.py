"""How `distill eval` starts the ranks that answer: in the environment that cluster.* describes."""

import sys
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError, DistillError
from distill_cli.jobs.evaluation import answer
from distill_cli.jobs.named_models import Contender, find
from distill_cli.jobs.preflight import preflight, preflight_evaluation
from distill_cli.launch import local
from distill_cli.ranks.build_source import prompt_settings
from distill_cli.terminal.console import Console

RANK = "import os, sys; open(sys.argv[1], 'w').write(os.environ['TMPDIR'] + ' ' + os.environ['A']); sys.exit(1)"


def test_ranks_get_the_cluster_s_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = [sys.executable, "-c", RANK, str(tmp_path / "environment")]
    monkeypatch.setattr(local, "command", lambda run, options, **_: rank)
    (job,) = compose([f"cluster.tmp_dir={tmp_path}/node", "+cluster.env.A=1"])
    found = preflight(job.config)
    with pytest.raises(DistillError):
        answer(Contender("student", job.config, "student"), found, tmp_path)
    assert (tmp_path / "environment").read_text() == f"{tmp_path}/node 1"


def test_a_teacher_with_a_job_of_its_own_is_evaluated_from_its_files() -> None:
    (job,) = compose(["model.teacher.path=/models/t", "model.teacher.nodes=2"])
    config = job.config
    assert find("teacher", config, step=None, console=Console()).config.model.student.path == "/models/t"
    served = override(config, {"model.teacher.url": "http://127.0.0.1:8008", "model.teacher.nodes": 0})
    with pytest.raises(ConfigError, match="on a server; give its model's path"):
        find("teacher", served, step=None, console=Console())


def test_a_student_is_evaluated_without_the_teacher_s_template() -> None:
    (job,) = compose(["model.teacher.chat_template=own"])
    (teacher,) = prompt_settings(preflight_evaluation(job.config, role="student")).teachers
    assert teacher.chat_template is None


def test_a_teacher_reads_prompts_as_it_scores() -> None:
    kwargs = "model.teacher.chat_template_kwargs={enable_thinking: true}"
    (job,) = compose(["model.chat_template='{{ x }}'", kwargs])
    model = find("teacher", job.config, step=None, console=Console()).config.model
    assert (model.chat_template, model.chat_template_kwargs) == ("{{ x }}", {"enable_thinking": True})
    own = override(job.config, {"model.teacher.chat_template": "own"})
    assert find("teacher", own, step=None, console=Console()).config.model.chat_template is None
    given = override(job.config, {"model.teacher.chat_template": "{{ y }}"})
    assert find("teacher", given, step=None, console=Console()).config.model.chat_template == "{{ y }}"


def test_a_near_name_is_suggested(tmp_path: Path) -> None:
    (job,) = compose([])
    with pytest.raises(ConfigError, match="befor: no such run, folder or model of the run; did you mean before?"):
        find("befor", job.config, step=None, console=Console())
