"""Launchers by name, what each has to have; caches and temporary files go where cluster.* says."""

import os
from dataclasses import fields
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError
from distill_cli.jobs.preflight import preflight, use_hub_cache
from distill_cli.launch.base import LAUNCHERS, launcher_of
from distill_cli.launch.local import environment
from distill_cli.launch.nodes import node_variables


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


def test_ranks_get_the_cluster_s_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    folders = {"hf_home": "hf", "compile_cache": "c", "tmp_dir": "t"}
    overrides = [f"cluster.{key}=$NODE_DISK/{folder}" for key, folder in folders.items()]
    monkeypatch.setenv("HF_HOME", "before")  # the checks set it
    env = environment(preflight(compose([*overrides, "+cluster.env.A=1"])[0].config))
    assert env["HF_HOME"] == f"{tmp_path}/hf"
    assert env["TMPDIR"] == f"{tmp_path}/t"
    assert env["A"] == "1"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
        assert env[name].startswith(f"{tmp_path}/c/")
    with pytest.raises(ConfigError, match=r"\$NO_SUCH is not set here"):
        node_variables(ClusterConfig(tmp_dir="${NO_SUCH}/x"))


def test_nodes_may_have_another_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "before")
    use_hub_cache(Config(cluster=ClusterConfig(hf_home="$NO_SUCH/hf", launcher="slurm")))
    assert os.environ["HF_HOME"] == "before"
    with pytest.raises(ConfigError, match="NO_SUCH"):
        use_hub_cache(Config(cluster=ClusterConfig(hf_home="$NO_SUCH/hf")))
    use_hub_cache(Config(cluster=ClusterConfig(hf_home=f"{tmp_path}/hf")))
    assert os.environ["HF_HOME"] == f"{tmp_path}/hf"
