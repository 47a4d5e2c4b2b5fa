"""Teachers with a job of their own: which have one, with what settings, and what is refused."""

import pytest

from distill_cli.config.checks import config_problems, inert_overrides
from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.config.teacher_jobs import job_config, teacher_nodes
from distill_cli.config.teachers import teacher_configs

A, B = "model.teachers.a.path=package://tiny_pair/teacher", "model.teachers.b.path=package://tiny_pair/student"


def composed(*argv: str) -> Config:
    (job,) = compose(["cluster=slurm", *argv])
    return job.config


def test_each_teacher_has_its_nodes() -> None:
    config = composed(A, B, "model.teachers.a.nodes=2")
    assert teacher_nodes(config) == {"a": 2}
    a, b = (one.model.teacher for one in teacher_configs(config).values())
    assert (a.has_job, a.has_engine, a.has_files) == (True, False, True)
    assert (b.has_job, b.has_engine, b.has_files) == (False, True, True)
    assert teacher_nodes(composed("model.teacher.nodes=3")) == {"teacher": 3}
    assert teacher_nodes(composed()) == {}


def test_a_job_has_its_own_settings() -> None:
    config = composed(
        "model.teacher.nodes=2", "cluster.nodes=4", "cluster.gpus_per_node=8", "cluster.slurm.account=me",
        "cluster.slurm.partition=small", "cluster.slurm.extra.reservation=mine",
        "cluster.slurm.teacher.partition=large", "cluster.slurm.teacher.gpus_per_node=4",
        "cluster.slurm.teacher.extra.begin=now",
    )  # fmt: skip
    cluster = job_config(config, "teacher").cluster
    assert (cluster.nodes, cluster.gpus_per_node, cluster.slurm.partition) == (2, 4, "large")
    assert (cluster.slurm.account, cluster.slurm.teacher) == ("me", {})
    assert cluster.slurm.extra == {"reservation": "mine", "begin": "now"}
    assert (config.cluster.nodes, config.cluster.gpus_per_node, config.cluster.slurm.partition) == (4, 8, "small")


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("model.teacher.nodes=-1", "model.teacher.nodes=-1: must be at least 0"),
        (
            "model.teacher.nodes=1 model.teacher.url=http://127.0.0.1:1",
            "model.teacher.nodes=1: model.teacher.url needs",
        ),
        ("model.teacher.nodes=1 model.teacher.path=student", "model.teacher.nodes=1: model.teacher.path=student needs"),
        (
            "model.teacher.nodes=1 cluster.slurm.teacher.partitoin=x",
            "cluster.slurm.teacher.partitoin: unknown key; did you mean partition?",
        ),
        ("model.teacher.nodes=1 cluster.slurm.teacher.signal_s=x", "cluster.slurm.teacher: Value 'x'"),
        (
            "model.teacher.nodes=1 cluster.slurm.teacher.max_requeues=-1",
            "cluster.slurm.teacher.max_requeues=-1: must be at least 0",
        ),
        (
            "model.teacher.nodes=1 model.teacher.patience_s=1800",
            "model.teacher.patience_s=1800.0: must be less than cluster.hang_timeout_s",
        ),
    ],
)
def test_wrong_settings_are_refused(typed: str, problem: str) -> None:
    problems = config_problems(composed(*typed.split()))
    assert [one for one in problems if one.startswith(problem)], problems


def test_patience_is_read_with_nodes() -> None:
    typed = ["model.teacher.nodes=1", "model.teacher.patience_s=60"]
    assert inert_overrides(composed(*typed), typed) == []
    assert len(inert_overrides(composed(*typed[1:]), typed[1:])) == 1
