"""Warnings about a job, and commands that need this machine."""

import pytest

from distill_cli.config.compose import compose
from distill_cli.errors import ConfigError
from distill_cli.jobs.prepare import require_here, resolve_jobs, unread_keys


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        ("cluster.slurm.partition=gpu cluster.max_restarts=1", ["cluster.slurm.partition"]),
        ("+cluster.slurm.extra.reservation=mine", ["cluster.slurm.extra.reservation"]),
        ("cluster.wait=true", ["cluster.wait"]),
        ("cluster=slurm cluster.slurm.partition=gpu cluster.wait=true", []),
    ],
)
def test_keys_of_other_launchers_warn(overrides: str, unread: list[str]) -> None:
    (job,) = compose(overrides.split())
    warnings = list(unread_keys(job.config.cluster, job.overrides))
    assert [warning.split(" ")[0] for warning in warnings] == unread
    assert all("no effect with cluster.launcher=local" in warning for warning in warnings)


def test_checks_run_on_this_machine() -> None:
    require_here(compose([])[0].config, "distill check")
    with pytest.raises(ConfigError, match="cluster.launcher=slurm: distill check .* cluster=local"):
        require_here(compose(["cluster=slurm"])[0].config, "distill check")


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="cluster.launcher=pbs: no such launcher"):
        resolve_jobs(compose(["cluster.launcher=pbs"]))
