"""Launchers by name, and what each has to have."""

from dataclasses import fields

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.errors import ConfigError
from distill_cli.launch.base import LAUNCHERS, launcher_of


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_has_its_name(name: str) -> None:
    launcher = launcher_of(name)
    assert launcher.name == name
    assert launcher.unread <= {field.name for field in fields(ClusterConfig)}
    (job,) = compose([f"cluster={name}"])
    assert job.config.cluster.launcher == name


def test_an_unknown_launcher_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cluster.launcher=slrum: .* did you mean slurm\?"):
        launcher_of("slrum")


def test_local_is_one_machine() -> None:
    (job,) = compose(["cluster.nodes=2"])
    assert "cluster.nodes=2" in next(launcher_of("local").problems(job.config))
