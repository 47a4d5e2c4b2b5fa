"""The teachers that are served by a job of their own (`model.teacher.nodes`), and the settings of that job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill_cli.config.choices import nearest
from distill_cli.config.derived import needs_scorer
from distill_cli.config.execution_schema import ClusterConfig, SlurmConfig
from distill_cli.config.schema import Config
from distill_cli.config.teachers import teacher_configs
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError

KEY = "cluster.slurm.teacher"
GPUS = "gpus_per_node"
OWN_KEYS = ({field.name for field in dataclasses.fields(SlurmConfig)} - {"teacher"}) | {GPUS}
"""What such a job may have otherwise than the run's."""


def teacher_nodes(config: Config) -> dict[str, int]:
    """Return the nodes of each teacher with a job of its own, by name; empty if the run scores nothing.

    Raises:
        ConfigError: an entry of `model.teachers` is wrong.
    """
    if not needs_scorer(config):
        return {}
    models = {name: one.model.teacher for name, one in teacher_configs(config).items()}
    return {name: model.nodes for name, model in models.items() if model.has_job}


def job_config(config: Config, name: str) -> Config:
    """Return the config of a teacher's job: the run's with that teacher alone, and the job's `cluster`.

    Raises:
        ConfigError: `cluster.slurm.teacher` has an unknown key, or a value of another type.
    """
    alone = teacher_configs(config)[name]
    own = dict(config.cluster.slurm.teacher)
    if unknown := sorted({str(key) for key in own} - OWN_KEYS):
        raise ConfigError(*(f"{KEY}.{key}: unknown key{nearest(key, sorted(OWN_KEYS))}" for key in unknown))
    changed: dict[str, Any] = {"nodes": alone.model.teacher.nodes}
    if GPUS in own:
        changed |= {GPUS: own.pop(GPUS), "ranks_per_node": None}
    inherited = dataclasses.replace(config.cluster, slurm=dataclasses.replace(config.cluster.slurm, teacher={}))
    try:
        changed["slurm"] = own
        merged = OmegaConf.merge(OmegaConf.structured(inherited), OmegaConf.create(changed))
        cluster: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{KEY}: {str(error).splitlines()[0]}") from error
    assert isinstance(cluster, ClusterConfig)
    return override(alone, {"cluster": cluster})


def job_key(problem: str, *, own: dict[str, Any], model: str) -> str:
    """Return a problem of a job's `cluster` with the key that the user gave for it.

    Args:
        own: `cluster.slurm.teacher`.
        model: section of the teacher.
    """
    for key in own:
        section = "cluster" if key == GPUS else "cluster.slurm"
        problem = problem.replace(f"{section}.{key}", f"{KEY}.{key}")
    return problem.replace("cluster.nodes=", f"{model}.nodes=")


def own_key_problems(config: Config) -> Iterator[str]:
    """Yield one line for each key of `cluster.slurm.teacher` that cannot be."""
    try:
        for name in teacher_nodes(config):
            job_config(config, name)
    except ConfigError as error:
        yield from error.problems
