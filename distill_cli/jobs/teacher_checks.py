"""Checks of `preflight` about where teachers score: in this job, in jobs of their own, on servers. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from distill_cli.config.schema import Config, TeacherModel
from distill_cli.config.teacher_jobs import teacher_nodes
from distill_cli.config.teachers import model_key, path_key, teacher_configs
from distill_cli.engines.wire import TOKEN, token_problem
from distill_cli.errors import collect
from distill_cli.launch.base import launcher_of
from distill_cli.models.model_files import ModelFiles

if TYPE_CHECKING:
    from distill_cli.jobs.preflight import Facts
    from distill_cli.jobs.served_teachers import Served


def find_teachers(facts: Facts, config: Config) -> None:
    """Raises ConfigError with all that are not found."""
    if "teacher" not in facts.roles:
        return
    models = {name: one.model.teacher for name, one in teacher_configs(config).items()}
    if all(model.path is not None or model.addresses for model in models.values()):  # else `config_problems` says so
        found = collect(partial(find_teacher, facts, model, name=name) for name, model in models.items())
        facts.served = {name: one for name, one in zip(models, found, strict=True) if not isinstance(one, ModelFiles)}
        files = [one if isinstance(one, ModelFiles) else one.files for one in found]
        facts.teachers = dict(zip(models, files, strict=True))


def find_teacher(facts: Facts, model: TeacherModel, *, name: str) -> ModelFiles | Served:
    """Return a teacher's files, or what its servers say. Raises ConfigError."""
    if model.is_student:
        student = facts.config.model.student
        return facts.student or ModelFiles.find(student.path, revision=student.revision, key="model.student.path")
    if model.addresses:
        from distill_cli.jobs.served_teachers import look_at  # its libraries take a while to import

        return look_at(model, key=model_key(name))
    assert model.path is not None
    return ModelFiles.find(model.path, revision=model.revision, key=path_key(name))


def check_servers(facts: Facts, config: Config) -> Iterator[str]:
    """The servers of teachers must give what the run needs."""
    alone = teacher_configs(config) if facts.served else {}
    for name, served in facts.served.items():
        from distill_cli.engines.server_info import VLLM
        from distill_cli.jobs.served_teachers import limit_problems, slowness, vllm_problems

        key = model_key(name)
        yield from limit_problems(alone[name], served, key=key)
        if served.kind is VLLM:
            facts.warnings.append(slowness(served, key=key))
            is_own = alone[name].model.teacher.has_own_tokenizer
            vocabulary, tokenizer = (None, served.files) if is_own else (facts.vocabulary, facts.tokenizer)
            yield from vllm_problems(alone[name], served, key=key, vocabulary=vocabulary, tokenizer=tokenizer)


def job_problems(facts: Facts, config: Config) -> Iterator[str]:
    """Yield why the cluster cannot take the jobs that serve teachers; `config` is as the cluster resolved it."""
    nodes, launcher = teacher_nodes(config), launcher_of(config.cluster.launcher)
    for name in nodes if facts.trains else ():
        if launcher.serves_teachers:
            yield from launcher.teacher_problems(config, name)
        else:
            fix = f"set {model_key(name)}.nodes=0, or choose cluster=slurm"
            yield f"{model_key(name)}.nodes={nodes[name]}: cluster.launcher={launcher.name} submits no jobs; {fix}"
    token = os.environ.get(TOKEN)
    if token and nodes and (problem := token_problem(token)):
        yield problem
